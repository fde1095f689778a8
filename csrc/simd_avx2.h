// AVX2 + FMA + F16C vectors for row_kernels.h. Included inside a namespace and a target region: see row_kernels.cpp.

struct Simd {
  using Vec = __m256;
  static constexpr int kWidth = 8;

  static MR1_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  static MR1_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static MR1_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static MR1_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static MR1_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static MR1_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
  static MR1_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // b if either is NaN
  static MR1_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }  // likewise
  static MR1_INLINE float hmax(Vec a) {
    __m128 h = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_max_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_max_ss(h, _mm_movehdup_ps(h)));
  }
  static MR1_INLINE float hsum(Vec a) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
  }

  // What exp2_of needs: its result is then 0 below, inf above.
  static MR1_INLINE Vec bounded(Vec d, Vec floor, Vec ceiling) {
    return _mm256_min_ps(ceiling, _mm256_max_ps(floor, d));  // NaN stays
  }
  // 2^(d * rate), exactly 0 at kFloor and inf at kCeiling. A table of 8 fits one register (vpermps); with degree 3 the
  // relative error is 3e-8.
  static MR1_INLINE Vec exp2_of(Vec d, Vec rate) {
    const __m256 table = _mm256_castsi256_ps(_mm256_setr_epi32(
        0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7));
    const Vec magic = set1(kRoundMagic / 8);
    const Vec t = fma(d, rate, magic);  // the low bits of t are round(8 d rate)
    const Vec r = _mm256_fmsub_ps(d, rate, sub(t, magic));
    const __m256i bits = _mm256_castps_si256(t);
    const __m256i level = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, bits));
    const __m256i power = _mm256_add_epi32(level, _mm256_slli_epi32(bits, 20));
    Vec p = fma(set1(0x1.c6a003321d940p-5f), r, set1(0x1.ec0c313b12393p-3f));
    p = fma(fma(p, r, set1(0x1.62e4311120532p-1f)), r, set1(1.0f));
    return mul(_mm256_castsi256_ps(power), p);
  }

  struct Pair {
    Vec first, second;
  };
  static MR1_INLINE Pair load_pair(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + kWidth)}; }
  static MR1_INLINE Pair load_pair(const BFloat16* p) {  // even and odd elements: a shift and a mask
    const __m256i u = _mm256_loadu_si256((const __m256i*)p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16)), _mm256_castsi256_ps(_mm256_and_si256(u, upper_half()))};
  }
  static MR1_INLINE Pair load_pair(const Float16* p) {
    const __m128i* q = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }

  static MR1_INLINE void store_pair(float* p, Pair a) {
    _mm256_storeu_ps(p, a.first);
    _mm256_storeu_ps(p + kWidth, a.second);
  }
  template <typename Half>
  static MR1_INLINE void store_pair(Half* p, Pair a) {
    _mm256_storeu_si256((__m256i*)p, pack(a, p));
  }

  // Past the cache; p is aligned to a cache line.
  static MR1_INLINE void stream_pair(float* p, Pair a) {
    _mm256_stream_ps(p, a.first);
    _mm256_stream_ps(p + kWidth, a.second);
  }
  template <typename Half>
  static MR1_INLINE void stream_pair(Half* p, Pair a) {
    _mm256_stream_si256((__m256i*)p, pack(a, p));
  }
  static MR1_INLINE void fence() { _mm_sfence(); }

 private:
  static MR1_INLINE __m256i upper_half() { return _mm256_set1_epi32((int)0xffff0000); }
  static MR1_INLINE __m256i rounded_to_bf16(Vec a) {  // to nearest even, in the upper half
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  }
  static MR1_INLINE __m256i pack(Pair a, BFloat16*) {
    const __m256i even = _mm256_srli_epi32(rounded_to_bf16(a.first), 16), odd = rounded_to_bf16(a.second);
    return _mm256_blend_epi16(even, odd, 0xaa);
  }
  static MR1_INLINE __m256i pack(Pair a, Float16*) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(a.second, kNearest), _mm256_cvtps_ph(a.first, kNearest));
  }
};
