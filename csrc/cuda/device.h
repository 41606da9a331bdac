// What every CUDA kernel includes: element types, launches, checks on either side.
//
// Kernels keep to what tests/cuda/emulate.h can run on a CPU: static shared memory, block and full-warp barriers, shuffles of
// whole warps, and launches through launch() alone. Host code checks what it can see (shapes, strides, dtypes, alignment) and
// never waits for the device; what only the device knows (the plan, ids, NaN) is checked there by MWM_REQUIRE.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef MWM_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef NDEBUG
#include <cassert>
// A device-side assertion: the text goes to stderr and every later call of the context fails.
#define MWM_REQUIRE(condition, message) \
  do { \
    if (!(condition)) __assert_fail(message, "mwm", 0, ""); \
  } while (0)
#define MWM_UNROLL _Pragma("unroll")
#define MWM_PRAGMA(text) _Pragma(#text)
#define MWM_UNROLL_BY(count) MWM_PRAGMA(unroll count)
#endif

#include "../ops_cuda.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// Bits of a number in a narrow type, on the host.
#ifdef MWM_EMULATE
inline uint16_t bfloat16_bits(float x) { return emulate::to_bfloat16(x); }
inline uint16_t half_bits(float x) { return emulate::to_half(x); }
#else
inline uint16_t bfloat16_bits(float x) { return __nv_bfloat16_raw(__float2bfloat16_rn(x)).x; }
inline uint16_t half_bits(float x) { return __half_raw(__float2half_rn(x)).x; }
#endif

#ifdef MWM_EMULATE
inline float widen(BFloat16 x) { return emulate::from_bfloat16(x.bits); }
inline float widen(Half x) { return emulate::from_half(x.bits); }
template <class T> T narrow(float x);
template <> inline BFloat16 narrow<BFloat16>(float x) { return {emulate::to_bfloat16(x)}; }
template <> inline Half narrow<Half>(float x) { return {emulate::to_half(x)}; }
#else
__device__ inline float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ inline float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T> __device__ T narrow(float x);
template <> __device__ inline BFloat16 narrow<BFloat16>(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
template <> __device__ inline Half narrow<Half>(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
#endif
__device__ inline float widen(float x) { return x; }
template <> __device__ inline float narrow<float>(float x) { return x; }

// Elements that are loaded and stored by one instruction.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T item[kCount];
};

template <class T>
__host__ __device__ inline T least(T a, T b) { return b < a ? b : a; }

template <class T>
__host__ __device__ inline T most(T a, T b) { return a < b ? b : a; }

template <class T>
__host__ __device__ inline T ceil_div(T a, T b) { return (a + b - 1) / b; }

// Towards minus infinity; the common case of one tile needs no division.
__device__ inline int floor_div(int a, int b) {
  if (a >= 0 && a < b) return 0;
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

template <class T>
inline T* pointer(const View& view) { return static_cast<T*>(view.data); }

inline bool aligned(const View& view, int64_t bytes) { return reinterpret_cast<std::uintptr_t>(view.data) % static_cast<std::uintptr_t>(bytes) == 0; }

// Where a kernel runs: torch's device and its current stream.
struct Place {
  cudaStream_t stream;

  Place(int64_t device, int64_t stream_address) : stream(reinterpret_cast<cudaStream_t>(stream_address)) {
    // The caller has made the device current; this tells our own copy of the runtime.
    const cudaError_t error = cudaSetDevice(static_cast<int>(device));
    if (error != cudaSuccess) throw std::runtime_error(std::string("mwm: device ") + std::to_string(device) + ": " + cudaGetErrorString(error));
  }
};

template <class... Parameters, class... Arguments>
void launch(const char* op, const Place& place, int64_t blocks_x, int64_t blocks_y, int threads, void (*kernel)(Parameters...), const Arguments&... arguments) {
  if (blocks_x == 0 || blocks_y == 0) return;
  if (blocks_x > INT32_MAX || blocks_y > 65535) fail("%s: needs %lld x %lld blocks, more than a grid has", op, static_cast<long long>(blocks_x), static_cast<long long>(blocks_y));
  const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y)), block(static_cast<unsigned>(threads));
#ifdef MWM_EMULATE
  emulate::run(op, grid, block, [&] { kernel(static_cast<Parameters>(arguments)...); });
#else
  kernel<<<grid, block, 0, place.stream>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
#endif
  static_cast<void>(place);
}

// Calls function(T{}) for the float type of a view.
template <class Function>
void with_float(const char* op, DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kBFloat16: return function(BFloat16{});
    case DType::kFloat16: return function(Half{});
    default: fail("%s: needs float32, bfloat16 or float16, got code %d", op, static_cast<int>(dtype));
  }
}

// The parts of a plan's check that the host can make; kernels bound what they read of it.
inline void check_plan_shape(const char* op, const View& coords, const View& slots) {
  check(op, coords, 2, DType::kInt32);
  check(op, slots, 3, DType::kInt32);
  check_contiguous(op, coords);
  check_contiguous(op, slots);
  if (coords.shape[1] != 3) fail("%s: coords must be [T, 3]", op);
  if (element_count(op, slots) > INT32_MAX || coords.shape[0] > INT32_MAX) fail("%s: the plan has more than 2^31 patches", op);
}

inline void check_tiles(const char* op, const View& view, DType dtype) {
  check(op, view, 4, dtype);
  check_channels_last(op, view);
}

// A plan as kernels read it.
struct Plan {
  const int32_t *coords, *slots;
  int32_t batch, rows, columns;

  Plan(const View& coords_view, const View& slots_view)
      : coords(pointer<int32_t>(coords_view)), slots(pointer<int32_t>(slots_view)), batch(static_cast<int32_t>(slots_view.shape[0])),
        rows(static_cast<int32_t>(slots_view.shape[1])), columns(static_cast<int32_t>(slots_view.shape[2])) {}

  // Image, row and column of a tile; what lies outside the grid must not become an address.
  __device__ void place_of(int64_t tile, int32_t* image, int32_t* row, int32_t* column) const {
    *image = coords[3 * tile], *row = coords[3 * tile + 1], *column = coords[3 * tile + 2];
    MWM_REQUIRE(static_cast<uint32_t>(*image) < static_cast<uint32_t>(batch) && static_cast<uint32_t>(*row) < static_cast<uint32_t>(rows) &&
                    static_cast<uint32_t>(*column) < static_cast<uint32_t>(columns),
                "mwm: coords of a tile do not fit the plan's grid. Use build_plan.");
  }

  // Tile of a patch, or -1 where it is hidden; -2 outside the grid.
  __device__ int32_t tile_at(int32_t image, int32_t row, int32_t column, int32_t tiles) const {
    if (static_cast<uint32_t>(row) >= static_cast<uint32_t>(rows) || static_cast<uint32_t>(column) >= static_cast<uint32_t>(columns)) return -2;
    const int32_t slot = slots[(static_cast<int64_t>(image) * rows + row) * columns + column];
    return static_cast<uint32_t>(slot) < static_cast<uint32_t>(tiles) ? slot : -1;
  }
};

}  // namespace
}  // namespace cuda
}  // namespace mwm
