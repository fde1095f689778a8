// The two passes over a row of logits, for the vectors of the `Simd` in scope. Included once per instruction set, inside
// a namespace and a target region (grpo_cpu.cpp); only what is inlined here may be called, or code for one instruction
// set could be linked into another's path.

constexpr int kUnroll = 4;
constexpr float kFloor = -127.0f;  // 2^-127 and below is 0

// A vector of n < kWidth values at p; the rest is -inf, which adds nothing to any sum.
template <typename T>
static MR1_INLINE Simd::Vec load_part(const T* p, int64_t n) {
  T buffer[Simd::kWidth];
  for (int64_t i = 0; i < Simd::kWidth; ++i) {
    if (i < n) {
      buffer[i] = p[i];
    } else {
      set_negative_infinity(buffer + i);
    }
  }
  return Simd::load(buffer);
}

template <typename T>
static MR1_INLINE void store_part(T* p, Simd::Vec a, int64_t n) {
  T buffer[Simd::kWidth];
  Simd::store(buffer, a);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <typename T>
static MR1_INLINE Simd::Vec block_max(const T* z, int64_t n) {
  constexpr int W = Simd::kWidth, kStride = W * kUnroll;
  Simd::Vec m[kUnroll];
  for (int u = 0; u < kUnroll; ++u) m[u] = Simd::set1(-INFINITY);
  int64_t i = 0;
  for (; i + kStride <= n; i += kStride) {
    // The hardware prefetcher stops at page ends and cannot keep up; rows mostly follow each other in memory, so that
    // running over the row's end fetches the next one. A prefetch never faults.
    for (int line = 0; line * 64 < (int)(kStride * sizeof(T)); ++line) {
      __builtin_prefetch((const char*)(z + i) + kPrefetchBytes + line * 64, 0, 3);
    }
    for (int u = 0; u < kUnroll; ++u) m[u] = Simd::max(m[u], Simd::load(z + i + u * W));
  }
  for (; i + W <= n; i += W) m[0] = Simd::max(m[0], Simd::load(z + i));
  if (i < n) m[0] = Simd::max(m[0], load_part(z + i, n - i));
  return Simd::max(Simd::max(m[0], m[1]), Simd::max(m[2], m[3]));
}

// Statistics of one block; exp(z - max) goes to e if kStore. The maximum returned is that of the logits, before scaling.
template <bool kStore, typename T>
static MR1_INLINE RowStats<float> visit_block(const T* z, float* e, int64_t n, float levels) {
  constexpr int W = Simd::kWidth, kStride = W * kUnroll;
  using Vec = Simd::Vec;
  const float top = Simd::hmax(block_max(z, n));
  // A block of banned tokens only (-inf): any finite shift gives exponentials of 0 instead of NaN.
  const Vec shift = Simd::set1(top == -INFINITY ? 0.0f : top), scale = Simd::set1(levels);
  const Vec floor = Simd::set1(kFloor * Simd::kLevels);
  Vec sum[kUnroll], weighted[kUnroll];
  for (int u = 0; u < kUnroll; ++u) sum[u] = weighted[u] = Simd::set1(0.0f);

#define MR1_VISIT(u, loaded, stored)                                                          \
  {                                                                                           \
    const Vec y = Simd::max(floor, Simd::mul(Simd::sub(loaded, shift), scale));               \
    const Vec x = Simd::exp2_levels(y);                                                       \
    stored;                                                                                   \
    sum[u] = Simd::add(sum[u], x);                                                            \
    weighted[u] = Simd::fma(x, y, weighted[u]);                                               \
  }
  int64_t i = 0;
  for (; i + kStride <= n; i += kStride) {
    for (int u = 0; u < kUnroll; ++u) {
      MR1_VISIT(u, Simd::load(z + i + u * W), if (kStore) Simd::store(e + i + u * W, x))
    }
  }
  for (; i + W <= n; i += W) MR1_VISIT(0, Simd::load(z + i), if (kStore) Simd::store(e + i, x))
  if (i < n) MR1_VISIT(0, load_part(z + i, n - i), if (kStore) store_part(e + i, x, n - i))
#undef MR1_VISIT
  const float s = Simd::hsum(Simd::add(Simd::add(sum[0], sum[1]), Simd::add(sum[2], sum[3])));
  const float w = Simd::hsum(Simd::add(Simd::add(weighted[0], weighted[1]), Simd::add(weighted[2], weighted[3])));
  return {top, s, w * (0.69314718055994531f / Simd::kLevels)};
}

template <bool kStream, typename T>
static MR1_INLINE void scale_block(const float* e, T* out, int64_t n, float factor) {
  constexpr int W = Simd::kWidth, kStride = W * kUnroll;
  const Simd::Vec f = Simd::set1(factor);
  int64_t i = 0;
  for (; i + kStride <= n; i += kStride) {
    for (int u = 0; u < kUnroll; ++u) {
      const Simd::Vec g = Simd::mul(Simd::load(e + i + u * W), f);
      if (kStream) {
        Simd::stream(out + i + u * W, g);
      } else {
        Simd::store(out + i + u * W, g);
      }
    }
  }
  for (; i + W <= n; i += W) Simd::store(out + i, Simd::mul(Simd::load(e + i), f));
  if (i < n) store_part(out + i, Simd::mul(load_part(e + i, n - i), f), n - i);
}

// out = p * (base + slope * log p), with p from the logits and the row's log-sum-exp.
template <typename T>
static MR1_INLINE void differentiate_block(const T* z, T* out, int64_t n, const Step& step) {
  constexpr int W = Simd::kWidth;
  using Vec = Simd::Vec;
  const Vec shift = Simd::set1(step.lse), temperature = Simd::set1(step.inv_temperature);
  const Vec levels = Simd::set1(1.44269504088896341f * Simd::kLevels), floor = Simd::set1(kFloor * Simd::kLevels);
  const Vec base = Simd::set1(step.gradient.base);
  const Vec slope = Simd::set1(step.gradient.slope * (0.69314718055994531f / Simd::kLevels));
#define MR1_GRADIENT(name, loaded)                                                                            \
  const Vec y_##name = Simd::max(floor, Simd::mul(Simd::sub(Simd::mul(loaded, temperature), shift), levels)); \
  const Vec name = Simd::mul(Simd::exp2_levels(y_##name), Simd::fma(slope, y_##name, base));
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch((const char*)(z + i) + kPrefetchBytes, 0, 3);
    MR1_GRADIENT(g, Simd::load(z + i))
    Simd::store(out + i, g);
  }
  if (i < n) {
    MR1_GRADIENT(g, load_part(z + i, n - i))
    store_part(out + i, g, n - i);
  }
#undef MR1_GRADIENT
}

// Pass 2 of the previous row and pass 1 of this one, block by block in turn: while the one computes from the cache, the
// other waits for memory.
template <typename T>
static void run_step(const Step& step) {
  const T* z = (const T*)step.z;
  const T* previous_z = (const T*)step.previous_z;
  T* out = (T*)step.out;
  const float levels = (float)(1.44269504088896341 * Simd::kLevels * step.inv_temperature);
  for (int64_t lo = 0, block = 0; lo < step.vocabulary; lo += kBlock, ++block) {
    const int64_t n = step.vocabulary - lo < kBlock ? step.vocabulary - lo : kBlock;
    if (out && step.previous_z) {
      differentiate_block(previous_z + lo, out + lo, n, step);
    } else if (out && step.stream) {
      scale_block<true>(step.previous_e + lo, out + lo, n, step.scale[block]);
    } else if (out) {
      scale_block<false>(step.previous_e + lo, out + lo, n, step.scale[block]);
    }
    if (z && step.e) {
      step.stats[block] = visit_block<true>(z + lo, step.e + lo, n, levels);
    } else if (z) {
      step.stats[block] = visit_block<false>(z + lo, (float*)nullptr, n, levels);
    }
  }
  if (step.stream) Simd::fence();
}

static const RowKernels kRowKernels = {run_step<float>, run_step<BFloat16>, run_step<Float16>};
