// AVX-512 (F, BW, DQ, VL; BF16 with MR1_AVX512_BF16) vectors for row_kernels.h. Included inside a namespace and a
// target region (row_kernels.cpp).

struct Simd {
  using Vec = __m512;
  static constexpr int kWidth = 16;

  static MR1_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static MR1_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static MR1_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static MR1_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static MR1_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static MR1_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
  static MR1_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static MR1_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // likewise
  static MR1_INLINE float hmax(Vec a) { return _mm512_reduce_max_ps(a); }
  static MR1_INLINE float hsum(Vec a) { return _mm512_reduce_add_ps(a); }

  // exp2_of's result is 0 below and inf above by itself; only for -inf it is NaN.
  static MR1_INLINE Vec bounded(Vec d, Vec, Vec) { return d; }
  // 2^(d * rate) = 2^n (a scaling) times 2^(k / 32) (a table) times a polynomial in the remainder: one register-to-
  // register lookup in two vectors and degree 2 reach a relative error of 5e-8.
  static MR1_INLINE Vec exp2_of(Vec d, Vec rate) {
    const Vec table_lo = _mm512_setr_ps(
        0x1.000000p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
        0x1.29e9e0p+0f, 0x1.306fe0p+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
        0x1.5ab07ep+0f, 0x1.6247ecp+0f);
    const Vec table_hi = _mm512_setr_ps(
        0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f, 0x1.93737cp+0f, 0x1.9c4918p+0f,
        0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f770p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f, 0x1.d5818ep+0f, 0x1.dfc974p+0f,
        0x1.ea4afap+0f, 0x1.f50766p+0f);
    const Vec magic = set1(kRoundMagic / 32);
    const Vec t = fma(d, rate, magic);  // the low bits of t are round(32 d rate)
    const Vec n = sub(t, magic), r = _mm512_fmsub_ps(d, rate, n);
    const Vec level = _mm512_permutex2var_ps(table_lo, _mm512_castps_si512(t), table_hi);
    const Vec p = fma(fma(set1(0x1.ebfc0263dad2ep-3f), r, set1(0x1.62e584a2eb27fp-1f)), r, set1(1.0f));
    return _mm512_scalef_ps(mul(level, p), n);  // 2^floor(n)
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
#ifdef MR1_AVX512_BF16
  static MR1_INLINE __m512i pack(Pair a, BFloat16*) {
    const __m512i interleave = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0);
    return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(a.second, a.first));
  }
#else
  static MR1_INLINE __m512i pack(Pair a, BFloat16*) {
    const __m512i even = _mm512_srli_epi32(rounded_to_bf16(a.first), 16), odd = rounded_to_bf16(a.second);
    return _mm512_ternarylogic_epi32(upper_half(), odd, even, 0xca);  // mask ? odd : even
  }
#endif
  static MR1_INLINE __m512i pack(Pair a, Float16*) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(a.first, kNearest));
    return _mm512_inserti64x4(low, _mm512_cvtps_ph(a.second, kNearest), 1);
  }
};
