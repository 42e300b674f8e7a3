// 16 numbers, and what is done to all of them at once.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace qjax {

#define QJAX_INLINE inline __attribute__((always_inline))
#define QJAX_INLINED __attribute__((always_inline))  // of a lambda, before its body
// In front of a loop with a constant count, whose array must live in registers.
#define QJAX_UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)

typedef float v16f __attribute__((vector_size(64), aligned(64)));
typedef int32_t v16i __attribute__((vector_size(64), aligned(64)));

typedef v16f v16f_any __attribute__((aligned(1), may_alias));  // at any address
typedef v16i v16i_any __attribute__((aligned(1), may_alias));

QJAX_INLINE v16f load(const float* p) { return *reinterpret_cast<const v16f_any*>(p); }
QJAX_INLINE v16i load_ints(const void* p) { return *reinterpret_cast<const v16i_any*>(p); }
QJAX_INLINE void store(float* p, v16f v) { *reinterpret_cast<v16f_any*>(p) = v; }
QJAX_INLINE v16i as_int(v16f v) { return (v16i)v; }
QJAX_INLINE v16f as_float(v16i v) { return (v16f)v; }
QJAX_INLINE v16f to_float(v16i v) { return __builtin_convertvector(v, v16f); }
QJAX_INLINE v16f vmax(v16f a, v16f b) { return (v16f)_mm512_max_ps((__m512)a, (__m512)b); }
QJAX_INLINE v16f vmin(v16f a, v16f b) { return (v16f)_mm512_min_ps((__m512)a, (__m512)b); }
QJAX_INLINE v16i vmax(v16i a, v16i b) { return a > b ? a : b; }
QJAX_INLINE v16f where_equal(v16f v, float x, v16f yes, v16f no) { return v == x ? yes : no; }
QJAX_INLINE v16f where_greater(v16f v, float x, v16f yes, v16f no) { return v > x ? yes : no; }

#else

// As wide as a register; g++ keeps what is wider in memory.
#if defined(__AVX__)
constexpr int kParts = 2;
#else
constexpr int kParts = 4;  // of NEON, or SSE
#endif
constexpr int kPartLanes = 16 / kParts;
typedef float part_f __attribute__((vector_size(64 / kParts)));
typedef int32_t part_i __attribute__((vector_size(64 / kParts)));

template <class T, class Part>
struct Lanes {
  Part part[kParts];

  Lanes() = default;
  QJAX_INLINE Lanes(T x) {
    QJAX_UNROLL for (Part& p : part) p = x - Part{};  // compilers know that nothing is subtracted
  }
  QJAX_INLINE T operator[](int i) const { return part[i / kPartLanes][i % kPartLanes]; }
  QJAX_INLINE Lanes operator-() const {
    return each([](Part a, Part) QJAX_INLINED { return -a; }, *this, *this);
  }
#define QJAX_OPERATOR(op)                                                                \
  friend QJAX_INLINE Lanes operator op(const Lanes& a, const Lanes& b) {                 \
    return each([](Part x, Part y) QJAX_INLINED { return Part(x op y); }, a, b);         \
  }                                                                                      \
  QJAX_INLINE Lanes& operator op##=(const Lanes& b) { return *this = *this op b; }
  QJAX_OPERATOR(+)
  QJAX_OPERATOR(-)
  QJAX_OPERATOR(*)
  QJAX_OPERATOR(/)
  QJAX_OPERATOR(&)
  QJAX_OPERATOR(|)
  QJAX_OPERATOR(^)
#undef QJAX_OPERATOR
  friend QJAX_INLINE Lanes operator<<(Lanes a, int n) {
    QJAX_UNROLL for (Part& p : a.part) p = p << n;
    return a;
  }
  friend QJAX_INLINE Lanes operator>>(Lanes a, int n) {
    QJAX_UNROLL for (Part& p : a.part) p = p >> n;
    return a;
  }
  template <class F>
  static QJAX_INLINE Lanes each(F&& f, const Lanes& a, const Lanes& b) {
    Lanes r;
    QJAX_UNROLL for (int i = 0; i < kParts; ++i) r.part[i] = f(a.part[i], b.part[i]);
    return r;
  }
};
using v16f = Lanes<float, part_f>;
using v16i = Lanes<int32_t, part_i>;

typedef part_f part_f_any __attribute__((aligned(1), may_alias));  // at any address
typedef part_i part_i_any __attribute__((aligned(1), may_alias));
QJAX_INLINE v16f load(const float* p) {
  v16f v;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i) v.part[i] = reinterpret_cast<const part_f_any*>(p)[i];
  return v;
}
QJAX_INLINE v16i load_ints(const void* p) {
  v16i v;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i) v.part[i] = static_cast<const part_i_any*>(p)[i];
  return v;
}
QJAX_INLINE void store(float* p, const v16f& v) {
  QJAX_UNROLL for (int i = 0; i < kParts; ++i) reinterpret_cast<part_f_any*>(p)[i] = v.part[i];
}
QJAX_INLINE v16i as_int(const v16f& v) {
  v16i r;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i) r.part[i] = (part_i)v.part[i];
  return r;
}
QJAX_INLINE v16f as_float(const v16i& v) {
  v16f r;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i) r.part[i] = (part_f)v.part[i];
  return r;
}
QJAX_INLINE v16f to_float(const v16i& v) {
  v16f r;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i) r.part[i] = __builtin_convertvector(v.part[i], part_f);
  return r;
}
QJAX_INLINE v16f vmax(const v16f& a, const v16f& b) {  // b where one is NaN
  return v16f::each([](part_f x, part_f y) QJAX_INLINED { return x > y ? x : y; }, a, b);
}
QJAX_INLINE v16f vmin(const v16f& a, const v16f& b) {
  return v16f::each([](part_f x, part_f y) QJAX_INLINED { return x < y ? x : y; }, a, b);
}
QJAX_INLINE v16i vmax(const v16i& a, const v16i& b) {
  return v16i::each([](part_i x, part_i y) QJAX_INLINED { return x > y ? x : y; }, a, b);
}
template <class T, class Part>
QJAX_INLINE v16f where_equal(const Lanes<T, Part>& v, T x, const v16f& yes, const v16f& no) {
  v16f r;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i)
    r.part[i] = v.part[i] == x - Part{} ? yes.part[i] : no.part[i];
  return r;
}
QJAX_INLINE v16f where_greater(const v16f& v, float x, const v16f& yes, const v16f& no) {
  v16f r;
  QJAX_UNROLL for (int i = 0; i < kParts; ++i)
    r.part[i] = v.part[i] > x - part_f{} ? yes.part[i] : no.part[i];
  return r;
}

#endif

QJAX_INLINE v16f splat(float x) { return x - v16f{}; }

}  // namespace qjax
