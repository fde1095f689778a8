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

// A logit after the soft cap, y = cap tanh(z / cap), and dy/dz = 1 - tanh^2; without a cap, z itself. A banned token
// (-inf) stays banned, with a slope that is finite. tanh(u) is u P(u^2) / Q(u^2) as in Eigen's ptanh, to 4e-7 of itself;
// beyond the limit it is 1 in float32. (token_loss.h has the scalar.)
struct CappedVec {
  Simd::Vec y, slope;
};

template <bool kCap>
static MR1_INLINE CappedVec cap_vec(Simd::Vec z, float softcap) {
  if (!kCap) return {z, z};
  const auto polynomial = [](Simd::Vec x, float first, auto... others) MR1_LAMBDA {
    Simd::Vec sum = Simd::set1(first);
    ((sum = Simd::fma(sum, x, Simd::set1(others))), ...);
    return sum;
  };
  const Simd::Vec limit = Simd::set1(7.90531111f), cap = Simd::set1(softcap), one = Simd::set1(1.0f);
  const Simd::Vec u = Simd::max(Simd::sub(Simd::set1(0.0f), limit), Simd::min(limit, Simd::div(z, cap)));  // NaN stays
  const Simd::Vec square = Simd::mul(u, u);
  const Simd::Vec p = polynomial(
      square, -2.76076847742355e-16f, 2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
      1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f);
  const Simd::Vec q = polynomial(
      square, 1.19825839466702e-06f, 1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f);
  const Simd::Vec t = Simd::div(Simd::mul(u, p), q);
  // z + FLT_MAX is -inf for a banned token and at least 0 for any other: no smaller than a y below 0.
  return {Simd::min(Simd::mul(cap, t), Simd::add(z, Simd::set1(FLT_MAX))), Simd::sub(one, Simd::mul(t, t))};
}

template <bool kCap, typename T>
static MR1_INLINE float largest(const T* z, int64_t n, float softcap) {
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
  const Simd::Vec most = Simd::max(Simd::max(m[0], m[1]), Simd::max(m[2], m[3]));
  return Simd::hmax(cap_vec<kCap>(most, softcap).y);  // it keeps their order
}

// Exponentials mostly have memory of their own, with room for a whole pair; those of float may stand in the gradient's
// (row_step.h), where another row follows.
template <typename T>
static MR1_INLINE void store_exponentials(float* e, Simd::Pair a, int64_t n) {
  if (std::is_same_v<T, float> && n < kPair) {
    store_rest(e, a, n);
  } else {
    Simd::store_pair(e, a);
  }
}

template <typename T>
static MR1_INLINE Simd::Pair load_exponentials(const float* e, int64_t n) {
  return std::is_same_v<T, float> && n < kPair ? load_rest(e, n) : Simd::load_pair(e);
}

// What pass 2 of the previous row does with its exponentials meanwhile: out = e * scale.
enum class Finish { kNothing, kStore, kStream };

template <Finish kFinish, typename T>
static MR1_INLINE void finish_pair(const float* e, T* out, Simd::Vec scale) {
  const Simd::Pair x = Simd::load_pair(e), d = {Simd::mul(x.first, scale), Simd::mul(x.second, scale)};
  if (kFinish == Finish::kStream) {
    Simd::stream_pair(out, d);
  } else {
    Simd::store_pair(out, d);
  }
}

template <typename T>
static MR1_INLINE void finish_rest(const float* e, T* out, Simd::Vec scale, int64_t n) {
  const Simd::Pair x = load_exponentials<T>(e, n);
  store_rest(out, {Simd::mul(x.first, scale), Simd::mul(x.second, scale)}, n);
}

template <Finish kFinish, typename T>
static MR1_INLINE void finish_block(const float* e, T* out, int64_t n, float scale) {
  const Simd::Vec f = Simd::set1(scale);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) finish_pair<kFinish>(e + i, out + i, f);
  if (i < n) finish_rest(e + i, out + i, f, n - i);
}

// Statistics of one block relative to `shift`: {shift, sum x, sum x d} with d = z - shift, x = exp(d / temperature).
// kKeep: x goes to e. kFinish: meanwhile the previous row's exponentials, p, become `out`; one loop for both, because
// the one computes while the other stores, and vector by vector, because p may be e. kAny: the logits may be -inf.
// kCap: z is soft-capped first, and what goes to e is x times the slope of that.
template <bool kKeep, bool kAny, bool kCap, Finish kFinish, typename T>
static MR1_INLINE RowStats<float> visit_block(
    const T* z, int64_t n, float rate, float softcap, float shift, float* e, const float* p, T* out, float scale) {
  using Vec = Simd::Vec;
  const Vec shifts = Simd::set1(shift), rates = Simd::set1(rate), scales = Simd::set1(scale);
  const Vec floor = Simd::set1(kFloor / rate), ceiling = Simd::set1(kCeiling / rate);
  Vec sum[4], weighted[4];
  for (int u = 0; u < 4; ++u) sum[u] = weighted[u] = Simd::set1(0.0f);
  const auto visit = [&](Vec logits, int u, bool any) MR1_LAMBDA {
    const CappedVec z = cap_vec<kCap>(logits, softcap);
    Vec d = Simd::bounded(Simd::sub(z.y, shifts), floor, ceiling);
    if (any) d = Simd::max(floor, d);
    const Vec x = Simd::exp2_of(d, rates);
    sum[u] = Simd::add(sum[u], x);
    weighted[u] = Simd::fma(x, d, weighted[u]);
    return kCap ? Simd::mul(x, z.slope) : x;
  };
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    // Into the second-level cache: the hardware prefetcher stops at page ends and cannot keep up. Rows mostly follow
    // each other, so that running over the row's end fetches the next one; a prefetch never faults.
    for (int line = 0; line < (int)(2 * kPair * sizeof(T)); line += 64) {
      __builtin_prefetch((const char*)(z + i) + kPrefetchBytes + line, 0, 2);
    }
    if (kFinish != Finish::kNothing) {
      finish_pair<kFinish>(p + i, out + i, scales);
      finish_pair<kFinish>(p + i + kPair, out + i + kPair, scales);
    }
    const Simd::Pair a = Simd::load_pair(z + i), b = Simd::load_pair(z + i + kPair);
    const Simd::Pair x = {visit(a.first, 0, kAny), visit(a.second, 1, kAny)};
    const Simd::Pair y = {visit(b.first, 2, kAny), visit(b.second, 3, kAny)};
    if (kKeep) {
      Simd::store_pair(e + i, x);
      Simd::store_pair(e + i + kPair, y);
    }
  }
  for (; i < n; i += kPair) {
    const bool whole = i + kPair <= n;
    if (kFinish != Finish::kNothing && whole) finish_pair<kFinish>(p + i, out + i, scales);
    if (kFinish != Finish::kNothing && !whole) finish_rest(p + i, out + i, scales, n - i);
    const Simd::Pair a = whole ? Simd::load_pair(z + i) : load_rest(z + i, n - i);
    const Simd::Pair x = {visit(a.first, 0, true), visit(a.second, 1, true)};  // what is missing is -inf
    if (kKeep) store_exponentials<T>(e + i, x, n - i);
  }
  const auto total = [](const Vec* v) MR1_LAMBDA {
    return Simd::hsum(Simd::add(Simd::add(v[0], v[1]), Simd::add(v[2], v[3])));
  };
  return {shift, total(sum), total(weighted)};
}

// Statistics relative to the block's own maximum, whatever the logits are.
template <bool kKeep, bool kCap, Finish kFinish, typename T>
static __attribute__((noinline)) RowStats<float> visit_any_block(
    const T* z, int64_t n, float rate, float softcap, float* e, const float* p, T* out, float scale) {
  const float top = largest<kCap>(z, n, softcap);
  // A block of banned tokens only (-inf): any finite shift gives exponentials of 0 instead of NaN.
  const float shift = top == -INFINITY ? 0.0f : top;
  const RowStats<float> s = visit_block<kKeep, true, kCap, kFinish>(z, n, rate, softcap, shift, e, p, out, scale);
  return {s.sum == s.sum ? top : s.sum, s.sum, s.weighted};  // NaN among banned tokens is NaN, not nothing
}

// out = x (base + slope d) with d = z - shift, x = exp(d / temperature). kCap: z is soft-capped first, out times the
// slope of that.
template <bool kCap, typename T>
static MR1_INLINE void differentiate_capped(
    const void* logits, void* gradient, int64_t n, float inv_temperature, float softcap, const RowDerivative& g) {
  using Vec = Simd::Vec;
  const T* z = (const T*)logits;
  T* out = (T*)gradient;
  const float rate = rate_of(inv_temperature);
  const Vec shift = Simd::set1(g.shift), rates = Simd::set1(rate), floor = Simd::set1(kFloor / rate);
  const Vec base = Simd::set1(g.base), slope = Simd::set1(g.slope);
  const auto derivative = [&](Vec logits) MR1_LAMBDA {
    const CappedVec z = cap_vec<kCap>(logits, softcap);
    const Vec d = Simd::max(floor, Simd::sub(z.y, shift));
    const Vec of_y = Simd::mul(Simd::exp2_of(d, rates), Simd::fma(slope, d, base));
    return kCap ? Simd::mul(of_y, z.slope) : of_y;
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

template <typename T>
static void differentiate_row(
    const void* logits, void* gradient, int64_t n, float inv_temperature, float softcap, const RowDerivative& g) {
  (softcap == INFINITY ? differentiate_capped<false, T> : differentiate_capped<true, T>)(
      logits, gradient, n, inv_temperature, softcap, g);
}

// Pass 1 of this row and pass 2 of the previous one. Exponentials are taken relative to the largest of the row's first
// logits, which is known at once and mostly near enough to the maximum. Where it is too low, or there are banned
// tokens, a block's sums say so, and the block is visited again relative to its own maximum, which serves from there
// on; unless the exponentials overwrite the logits: then each block's maximum comes first.
template <bool kKeep, bool kCap, Finish kFinish, typename T>
static MR1_INLINE void run_blocks(const Step& step, float rate) {
  const T* z = (const T*)step.z;
  const float softcap = step.softcap;
  float shift = largest<kCap>(z, step.vocabulary < 2 * kPair ? step.vocabulary : 2 * kPair, softcap);
  bool any = (const void*)step.e == step.z;
  for (int64_t lo = 0, block = 0; lo < step.vocabulary; lo += kBlock, ++block) {
    const int64_t n = step.vocabulary - lo < kBlock ? step.vocabulary - lo : kBlock;
    float* e = kKeep ? step.e + lo : nullptr;
    const float* p = kFinish == Finish::kNothing ? nullptr : step.previous_e + lo;
    const float scale = kFinish == Finish::kNothing ? 0.0f : step.scale[block];
    T* out = (T*)step.out + lo;
    RowStats<float>& s = step.stats[block];
    if (any) {
      s = visit_any_block<kKeep, kCap, kFinish>(z + lo, n, rate, softcap, e, p, out, scale);
      continue;
    }
    s = visit_block<kKeep, false, kCap, kFinish>(z + lo, n, rate, softcap, shift, e, p, out, scale);
    const bool undefined = s.weighted != s.weighted;  // 0 times -inf
    if (undefined || s.sum > kMostSum) {
      any = undefined;
      s = visit_any_block<kKeep, kCap, Finish::kNothing>(z + lo, n, rate, softcap, e, p, out, scale);
      shift = s.max > shift ? s.max : shift;
    }
  }
}

template <bool kCap, typename T>
static MR1_INLINE void run_row(const Step& step) {
  const float rate = rate_of(step.inv_temperature);
  if (!step.e) {
    run_blocks<false, kCap, Finish::kNothing, T>(step, rate);
  } else if (!step.out) {
    run_blocks<true, kCap, Finish::kNothing, T>(step, rate);
  } else if (step.stream) {
    run_blocks<true, kCap, Finish::kStream, T>(step, rate);
  } else {
    run_blocks<true, kCap, Finish::kStore, T>(step, rate);
  }
}

template <typename T>
static void run_step(const Step& step) {
  if (step.z && step.softcap == INFINITY) {
    run_row<false, T>(step);
  } else if (step.z) {
    run_row<true, T>(step);
  } else {
    for (int64_t lo = 0, block = 0; lo < step.vocabulary; lo += kBlock, ++block) {
      const int64_t n = step.vocabulary - lo < kBlock ? step.vocabulary - lo : kBlock;
      finish_block<Finish::kStore>(step.previous_e + lo, (T*)step.out + lo, n, step.scale[block]);
    }
  }
  if (step.stream) Simd::fence();
}

template <typename T>
static constexpr RowKernels kRowKernels = {run_step<T>, differentiate_row<T>};
