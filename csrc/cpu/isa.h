// What every CPU kernel includes. The files of csrc/cpu are compiled once per instruction set with MWM_ISA = its name, so all
// code here and there lives in namespace mwm::MWM_ISA or in an anonymous one. Function templates of std:: must not be used:
// the linker would keep one instance for all, perhaps one with instructions that the machine lacks.
#pragma once

#include <cstdint>
#include <cstring>

#include "../ops.h"
#include "../parallel.h"
#include "../view.h"

#ifndef MWM_ISA
#error "compile with -DMWM_ISA=portable|avx2|avx512|avx512bf16"
#endif

namespace mwm {
namespace MWM_ISA {

#define MWM_DECLARATION(name, arguments) void name arguments;
MWM_KERNELS(MWM_DECLARATION)
#undef MWM_DECLARATION

namespace {

template <class T>
inline T least(T a, T b) { return b < a ? b : a; }

template <class T>
inline T most(T a, T b) { return a < b ? b : a; }

template <class T>
inline T* pointer(const View& view) { return static_cast<T*>(view.data); }

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

template <class To, class From>
inline To bit_copy(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The type in which sums over T are taken.
template <class T> struct Wide { using type = float; };
template <> struct Wide<double> { using type = double; };

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
// By reference: GCC vectorises a load of x.bits, but not the copy of a struct.
inline float widen(const BFloat16& x) { return bit_copy<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(const Half& x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // A shift moves exponent and mantissa into place; the product rebiases the exponent and makes subnormals normal.
  const float scaled = bit_copy<float>(magnitude << 13) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bit_copy<uint32_t>(scaled);
  return bit_copy<float>(bits | sign);
}

template <class T> inline T narrow(float x);
template <class T> inline T narrow(double x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline double narrow<double>(double x) { return x; }
template <> inline BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7fc0u : rounded)};
}
template <> inline Half narrow<Half>(float x) {
  const uint32_t bits = bit_copy<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Adding 2^(e+13) of the right exponent rounds to half's step, to nearest even, and handles subnormals.
  const uint32_t exponent = most(magnitude & 0x7f800000u, 113u << 23);
  const float shifted = bit_copy<float>(magnitude) + bit_copy<float>(exponent + (13u << 23));
  const uint32_t steps = bit_copy<uint32_t>(shifted) & 0x007fffffu;
  uint32_t result = steps + (((exponent >> 23) - 113u) << 10);
  if (magnitude >= 0x477ff000u) result = 0x7c00u;
  if (x != x) result = 0x7e00u;
  return {static_cast<uint16_t>(result | sign)};
}

// to = narrow(x), in a form that vectorises for the struct types too.
inline void put(float& to, float x) { to = x; }
inline void put(double& to, double x) { to = x; }
inline void put(BFloat16& to, float x) { to.bits = narrow<BFloat16>(x).bits; }
inline void put(Half& to, float x) { to.bits = narrow<Half>(x).bits; }

// Calls function(T{}) for the float type of a view.
template <class Function>
inline void with_float(const char* op, DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kFloat64: return function(double{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat16: return function(Half{});
    default: fail("%s: needs a floating dtype, got code %d", op, static_cast<int>(dtype));
  }
}

// Calls function with an unsigned integer as wide as the element: for kernels that only move data.
template <class Function>
inline void with_bits(const char* op, DType dtype, const Function& function) {
  switch (item_size(dtype)) {
    case 1: return function(uint8_t{});
    case 2: return function(uint16_t{});
    case 4: return function(uint32_t{});
    case 8: return function(uint64_t{});
    default: fail("%s: unknown dtype code %d", op, static_cast<int>(dtype));
  }
}

}  // namespace
}  // namespace MWM_ISA
}  // namespace mwm
