// AVX-512 (F, BW, DQ, VL) vectors for row_kernels.h. Included inside a namespace and a target region (row_kernels.cpp).

struct Simd {
  using Vec = __m512;
  static constexpr int kWidth = 16;
  // exp is computed as 2^(n / kLevels) (table) times a polynomial in the remainder: with 32 levels, one register-to-
  // register lookup in two vectors and degree 2 reach a relative error of 5e-8.
  static constexpr float kLevels = 32.0f;

  static MR1_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static MR1_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static MR1_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static MR1_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static MR1_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static MR1_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static MR1_INLINE float hmax(Vec a) { return _mm512_reduce_max_ps(a); }
  static MR1_INLINE float hsum(Vec a) { return _mm512_reduce_add_ps(a); }

  // 2^(d * levels / kLevels) for d * levels <= about 0 and at least kFloor * kLevels, where the result is exactly 0.
  static MR1_INLINE Vec exp2_levels(Vec d, Vec levels) {
    const __m512i table_lo = _mm512_setr_epi32(
        0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0, 0x3f7837f0,
        0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6);
    const __m512i table_hi = _mm512_setr_epi32(
        0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e, 0x3f7744fd,
        0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3);
    const Vec magic = set1(kRoundMagic);
    const Vec t = fma(d, levels, magic);  // the low bits of t are round(d * levels)
    const Vec r = _mm512_fmsub_ps(d, levels, sub(t, magic));
    const __m512i bits = _mm512_castps_si512(t);
    const __m512i level = _mm512_permutex2var_epi32(table_lo, bits, table_hi);
    const __m512i power = _mm512_add_epi32(level, _mm512_slli_epi32(bits, 18));
    const Vec p = fma(fma(set1(0x1.ebfc0263dad2ep-13f), r, set1(0x1.62e584a2eb27fp-6f)), r, set1(1.0f));
    return mul(_mm512_castsi512_ps(power), p);
  }

  struct Pair {
    Vec first, second;
  };
  static MR1_INLINE Pair load_pair(const float* p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + kWidth)}; }
  static MR1_INLINE Pair load_pair(const BFloat16* p) {  // even and odd elements: a shift and a mask
    const __m512i u = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)), _mm512_castsi512_ps(_mm512_and_si512(u, upper_half()))};
  }
  static MR1_INLINE Pair load_pair(const Float16* p) {
    const __m256i* q = (const __m256i*)p;
    return {_mm512_cvtph_ps(_mm256_loadu_si256(q)), _mm512_cvtph_ps(_mm256_loadu_si256(q + 1))};
  }

  static MR1_INLINE void store_pair(float* p, Pair a) {
    _mm512_storeu_ps(p, a.first);
    _mm512_storeu_ps(p + kWidth, a.second);
  }
  template <typename Half>
  static MR1_INLINE void store_pair(Half* p, Pair a) {
    _mm512_storeu_si512(p, pack(a, p));
  }

  // Past the cache; p is aligned to a cache line.
  static MR1_INLINE void stream_pair(float* p, Pair a) {
    _mm512_stream_ps(p, a.first);
    _mm512_stream_ps(p + kWidth, a.second);
  }
  template <typename Half>
  static MR1_INLINE void stream_pair(Half* p, Pair a) {
    _mm512_stream_si512((__m512i*)p, pack(a, p));
  }
  static MR1_INLINE void fence() { _mm_sfence(); }

 private:
  static MR1_INLINE __m512i upper_half() { return _mm512_set1_epi32((int)0xffff0000); }
  static MR1_INLINE __m512i rounded_to_bf16(Vec a) {  // to nearest even, in the upper half
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  }
  static MR1_INLINE __m512i pack(Pair a, BFloat16*) {
    const __m512i even = _mm512_srli_epi32(rounded_to_bf16(a.first), 16), odd = rounded_to_bf16(a.second);
    return _mm512_ternarylogic_epi32(upper_half(), odd, even, 0xca);  // mask ? odd : even
  }
  static MR1_INLINE __m512i pack(Pair a, Float16*) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a.first, kNearest));
    return _mm512_inserti64x4(low, _mm512_cvtps_ph(a.second, kNearest), 1);
  }
};
