// The two passes over a row of logits, for the vectors of the `Simd` in scope. Included once per instruction set,
// inside a namespace and a target region (row_kernels.cpp); only what is inlined here may be called, or code for one
// instruction set could be linked into another's path.
//
// A `Pair` is two vectors of logits. For float they follow each other; 16-bit formats may split a pair differently
// (into even and odd elements, say), as long as store_pair undoes what load_pair did.

constexpr int64_t kPair = 2 * Simd::kWidth;
static_assert(kBlock % (2 * kPair) == 0);

// The n < kPair logits at p; the rest is -inf, which adds nothing to any sum.
template <typename T>
static MR1_INLINE Simd::Pair load_rest(const T* p, int64_t n) {
  T buffer[kPair];
  for (int64_t i = 0; i < kPair; ++i) {
    if (i < n) {
      buffer[i] = p[i];
    } else {
      set_negative_infinity(buffer + i);
    }
  }
  return Simd::load_pair(buffer);
}

template <typename T>
static MR1_INLINE void store_rest(T* p, Simd::Pair a, int64_t n) {
  T buffer[kPair];
  Simd::store_pair(buffer, a);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// The exponentials of a pair, of which n logits exist. Beside 16-bit logits they have memory of their own, with room
// for a whole pair, and keep its order; those of float may stand in the gradient's memory, where another row follows.
template <typename T>
static MR1_INLINE void store_exponentials(float* e, Simd::Pair a, int64_t n) {
  if (std::is_same_v<T, float> && n < kPair) {
    store_rest(e, a, n);
  } else {
    Simd::store_pair(e, a);
  }
}

template <typename T>
static MR1_INLINE float block_max(const T* z, int64_t n) {
  Simd::Vec m[4];
  for (auto& x : m) x = Simd::set1(-INFINITY);
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    const Simd::Pair a = Simd::load_pair(z + i), b = Simd::load_pair(z + i + kPair);
    m[0] = Simd::max(m[0], a.first);
    m[1] = Simd::max(m[1], a.second);
    m[2] = Simd::max(m[2], b.first);
    m[3] = Simd::max(m[3], b.second);
  }
  for (; i < n; i += kPair) {
    const Simd::Pair a = i + kPair <= n ? Simd::load_pair(z + i) : load_rest(z + i, n - i);
    m[0] = Simd::max(m[0], a.first);
    m[1] = Simd::max(m[1], a.second);
  }
  return Simd::hmax(Simd::max(Simd::max(m[0], m[1]), Simd::max(m[2], m[3])));
}

// The largest of many integers, in vectors of kBytes. Integers because float maxima share two of the four vector pipes
// with the additions of pass 1.
template <typename Int, int kBytes>
struct Largest {
  typedef Int Lanes __attribute__((vector_size(kBytes)));
  Lanes lanes = Lanes{} + std::numeric_limits<Int>::min();
  MR1_INLINE void include(Lanes x) { lanes = x > lanes ? x : lanes; }
  MR1_INLINE Int result() const {
    if constexpr (kBytes > 16) {
      using Half = Largest<Int, kBytes / 2>;
      typename Half::Lanes halves[2];
      __builtin_memcpy(halves, &lanes, kBytes);
      Half half{halves[0]};
      half.include(halves[1]);
      return half.result();
    } else {
      Int top = lanes[0];
      for (int i = 1; i < (int)(kBytes / sizeof(Int)); ++i) top = lanes[i] > top ? lanes[i] : top;
      return top;
    }
  }
};

// A block's maximum, and whether all exponentials relative to it are above the floor for certain. Positive floats are
// ordered as signed integers are; the largest unsigned one is the most negative float, if there is any, or a NaN.
struct Range {
  float max;
  bool near;
};

template <typename T>
static MR1_INLINE Range block_range(const T* z, int64_t n, float levels) {
  using Signed = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  using Unsigned = std::make_unsigned_t<Signed>;
  constexpr int kBytes = sizeof(Simd::Vec);
  constexpr int64_t kLanes = kBytes / sizeof(T);
  Largest<Signed, kBytes> largest[4];
  Largest<Unsigned, kBytes> lowest[4];
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) {
      typename Largest<Signed, kBytes>::Lanes x;
      __builtin_memcpy(&x, z + i + u * kLanes, kBytes);
      MR1_IN_REGISTER(x);  // or it is loaded twice, and loading is what this loop spends its time on
      largest[u].include(x);
      lowest[u].include((typename Largest<Unsigned, kBytes>::Lanes)x);
    }
  }
  for (int u = 1; u < 4; ++u) {
    largest[0].include(largest[u].lanes);
    lowest[0].include(lowest[u].lanes);
  }
  Signed top = largest[0].result();
  Unsigned low = lowest[0].result();
  for (; i < n; ++i) {
    Signed x;
    __builtin_memcpy(&x, z + i, sizeof x);
    top = x > top ? x : top;
    low = (Unsigned)x > low ? (Unsigned)x : low;
  }
  T max{}, min{};
  __builtin_memcpy(&max, &top, sizeof top);
  if ((Signed)low < 0) __builtin_memcpy(&min, &low, sizeof low);
  const float exact = top < 0 ? block_max(z, n) : to_float(max);
  return {exact, (to_float(min) - exact) * levels >= kFloor * Simd::kLevels};
}

// Statistics of one block: {max z, sum x, sum x (z - max)} with x = exp((z - max) / temperature). kStore: x goes to e.
// kNear: as block_range says.
template <bool kStore, bool kNear, typename T>
static MR1_INLINE RowStats<float> visit_block(const T* z, float* e, int64_t n, float levels, float top) {
  using Vec = Simd::Vec;
  // A block of banned tokens only (-inf): any finite shift gives exponentials of 0 instead of NaN.
  const Vec shift = Simd::set1(top == -INFINITY ? 0.0f : top), scale = Simd::set1(levels);
  const Vec floor = Simd::set1(kFloor * Simd::kLevels / levels);
  Vec sum[4], weighted[4];
  for (int u = 0; u < 4; ++u) sum[u] = weighted[u] = Simd::set1(0.0f);
  const auto visit = [&](Vec logits, int u, bool near) MR1_LAMBDA {
    const Vec below = Simd::sub(logits, shift), d = near ? below : Simd::max(floor, below);
    const Vec x = Simd::exp2_levels(d, scale);
    sum[u] = Simd::add(sum[u], x);
    weighted[u] = Simd::fma(x, d, weighted[u]);
    return x;
  };
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    // What a coming block's maximum will wait for, while this one computes. The hardware prefetcher stops at page ends
    // and cannot keep up. Rows mostly follow each other, so that running over the row's end fetches the next one; a
    // prefetch never faults.
    for (int line = 0; line < (int)(2 * kPair * sizeof(T)); line += 64) {
      __builtin_prefetch((const char*)(z + i) + kPrefetchBytes + line, 0, 3);
    }
    const Simd::Pair a = Simd::load_pair(z + i), b = Simd::load_pair(z + i + kPair);
    const Simd::Pair x = {visit(a.first, 0, kNear), visit(a.second, 1, kNear)};
    const Simd::Pair y = {visit(b.first, 2, kNear), visit(b.second, 3, kNear)};
    if (kStore) {
      Simd::store_pair(e + i, x);
      Simd::store_pair(e + i + kPair, y);
    }
  }
  for (; i < n; i += kPair) {
    const Simd::Pair a = i + kPair <= n ? Simd::load_pair(z + i) : load_rest(z + i, n - i);
    const Simd::Pair x = {visit(a.first, 0, false), visit(a.second, 1, false)};  // what is missing is -inf
    if (kStore) store_exponentials<T>(e + i, x, n - i);
  }
  const auto total = [](const Vec* v) MR1_LAMBDA {
    return Simd::hsum(Simd::add(Simd::add(v[0], v[1]), Simd::add(v[2], v[3])));
  };
  return {top, total(sum), total(weighted)};
}

template <typename T>
static MR1_INLINE RowStats<float> visit(const T* z, float* e, int64_t n, float levels, Range range) {
  if (e) {
    return range.near ? visit_block<true, true>(z, e, n, levels, range.max)
                      : visit_block<true, false>(z, e, n, levels, range.max);
  }
  return range.near ? visit_block<false, true>(z, e, n, levels, range.max)
                    : visit_block<false, false>(z, e, n, levels, range.max);
}

// out = e * factor.
template <bool kStream, typename T>
static MR1_INLINE void scale_block(const float* e, T* out, int64_t n, float factor) {
  const Simd::Vec f = Simd::set1(factor);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const Simd::Pair x = Simd::load_pair(e + i), d = {Simd::mul(x.first, f), Simd::mul(x.second, f)};
    if (kStream) {
      Simd::stream_pair(out + i, d);
    } else {
      Simd::store_pair(out + i, d);
    }
  }
  if (i < n) {
    const Simd::Pair x = std::is_same_v<T, float> ? load_rest(e + i, n - i) : Simd::load_pair(e + i);
    store_rest(out + i, {Simd::mul(x.first, f), Simd::mul(x.second, f)}, n - i);
  }
}

// out = x (base + slope d) with d = z - shift, x = exp(d / temperature).
template <typename T>
static MR1_INLINE void differentiate_block(const T* z, T* out, int64_t n, const RowDerivative& g, float levels) {
  using Vec = Simd::Vec;
  const Vec shift = Simd::set1(g.shift), scale = Simd::set1(levels);
  const Vec floor = Simd::set1(kFloor * Simd::kLevels / levels);
  const Vec base = Simd::set1(g.base), slope = Simd::set1(g.slope);
  const auto derivative = [&](Vec logits) MR1_LAMBDA {
    const Vec d = Simd::max(floor, Simd::sub(logits, shift));
    return Simd::mul(Simd::exp2_levels(d, scale), Simd::fma(slope, d, base));
  };
  for (int64_t i = 0; i < n; i += kPair) {
    const Simd::Pair a = i + kPair <= n ? Simd::load_pair(z + i) : load_rest(z + i, n - i);
    const Simd::Pair d = {derivative(a.first), derivative(a.second)};
    if (i + kPair <= n) {
      Simd::store_pair(out + i, d);
    } else {
      store_rest(out + i, d, n - i);
    }
  }
}

// Pass 2 of the previous row and pass 1 of this one, block by block in turn: while the one computes from the cache, the
// other waits for memory.
template <typename T>
static void run_step(const Step& step) {
  const T* z = (const T*)step.z;
  T* out = (T*)step.out;
  const float levels = (float)(1.44269504088896341 * Simd::kLevels * step.inv_temperature);
  for (int64_t lo = 0, block = 0; lo < step.vocabulary; lo += kBlock, ++block) {
    const int64_t n = step.vocabulary - lo < kBlock ? step.vocabulary - lo : kBlock;
    const Range range = z ? block_range(z + lo, n, levels) : Range{};  // pass 2 runs while this one's end is computed
    if (out && step.previous_z) {
      differentiate_block((const T*)step.previous_z + lo, out + lo, n, step.derivative, levels);
    } else if (out && step.stream) {
      scale_block<true>(step.previous_e + lo, out + lo, n, step.scale[block]);
    } else if (out) {
      scale_block<false>(step.previous_e + lo, out + lo, n, step.scale[block]);
    }
    if (z) step.stats[block] = visit(z + lo, step.e ? step.e + lo : nullptr, n, levels, range);
  }
  if (step.stream) Simd::fence();
}

static const RowKernels kRowKernels = {run_step<float>, run_step<BFloat16>, run_step<Float16>};
