// Vectors of four floats for row_kernels.h in GCC's vector extension (also Clang's): SSE2, NEON, or scalar code.

struct Simd {
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;

  static MR1_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
  static MR1_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static MR1_INLINE Vec sub(Vec a, Vec b) { return a - b; }
  static MR1_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  static MR1_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static MR1_INLINE Vec div(Vec a, Vec b) { return a / b; }
  static MR1_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b if either is NaN
  static MR1_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }  // likewise
  static MR1_INLINE float hmax(Vec a) {
    const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
    return x > y ? x : y;
  }
  static MR1_INLINE float hsum(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

  // What exp2_of needs: its result is then 0 below, inf above.
  static MR1_INLINE Vec bounded(Vec d, Vec floor, Vec ceiling) {
    d = max(floor, d);
    return ceiling < d ? ceiling : d;  // NaN stays
  }
  // 2^(d * rate), exactly 0 at kFloor and inf at kCeiling. No table: a lookup would be four scalar loads.
  static MR1_INLINE Vec exp2_of(Vec d, Vec rate) {
    const Vec y = d * rate;
    const Vec magic = set1(kRoundMagic);
    const Vec t = y + magic;  // the low bits of t are round(y)
    const Vec r = y - (t - magic);
    const Int power = (((Int)t) << 23) + 0x3f800000;
    Vec p = set1(0x1.5bba1399b51c0p-10f) * r + set1(0x1.3cea87b928444p-7f);
    p = p * r + set1(0x1.c6b752e2084d8p-5f);
    p = p * r + set1(0x1.ebf9bb8972b62p-3f);
    p = (p * r + set1(0x1.62e42920327a8p-1f)) * r + set1(1.0f);
    return (Vec)power * p;
  }

  struct Pair {
    Vec first, second;
  };
  static MR1_INLINE Pair load_pair(const float* p) {
    Pair a;
    __builtin_memcpy(&a, p, sizeof a);
    return a;
  }
  template <typename Half>
  static MR1_INLINE Pair load_pair(const Half* p) {
    return {Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])},
            Vec{to_float(p[4]), to_float(p[5]), to_float(p[6]), to_float(p[7])}};
  }
  static MR1_INLINE void store_pair(float* p, Pair a) { __builtin_memcpy(p, &a, sizeof a); }
  template <typename Half>
  static MR1_INLINE void store_pair(Half* p, Pair a) {
    for (int i = 0; i < kWidth; ++i) {
      from_float(a.first[i], p + i);
      from_float(a.second[i], p + kWidth + i);
    }
  }
  template <typename T>
  static MR1_INLINE void stream_pair(T* p, Pair a) {
    store_pair(p, a);
  }
  static MR1_INLINE void fence() {}
};
