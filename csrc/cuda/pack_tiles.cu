// Dense map to tiles and back: one block per tile (pack) or patch (unpack), bound by memory. Where a tile's rows are runs of memory
// on both sides they are moved in the widest unit that divides everything, 16 bytes if possible; any other strides go element by element,
// in the order of what is written.
#include "device.h"

#include <cstring>

namespace mwm {
namespace cuda {
namespace {

constexpr int kThreads = 256;

using Unit16 = Pack<uint64_t, 2>;

// The outer strides of a map or of tiles, in units; a line is edge * channels elements without gaps.
struct Lines {
  int64_t outer, row, column;  // image or tile; row of positions; tile beside the tile
};

template <class U>
__global__ void __launch_bounds__(kThreads) pack_lines_kernel(Plan plan, const U* x, Lines at, U* out, int32_t edge, int32_t line) {
  const int64_t n = blockIdx.x;
  int32_t b, r, c;
  plan.place_of(n, &b, &r, &c);
  const U* from = x + b * at.outer + static_cast<int64_t>(r) * edge * at.row + c * at.column;
  U* to = out + n * edge * line;
  for (int k = static_cast<int>(threadIdx.x); k < edge * line; k += static_cast<int>(blockDim.x)) to[k] = from[k / line * at.row + k % line];
}

template <class U>
__global__ void __launch_bounds__(kThreads) unpack_lines_kernel(Plan plan, const U* tiles, int32_t count, U* out, Lines at, int32_t edge, int32_t line, Unit16 pattern) {
  const int32_t column = static_cast<int32_t>(blockIdx.x % plan.columns), row = static_cast<int32_t>(blockIdx.x / plan.columns % plan.rows);
  const int32_t b = static_cast<int32_t>(blockIdx.x / plan.columns / plan.rows);
  const int32_t n = plan.tile_at(b, row, column, count);
  const U fill = *reinterpret_cast<const U*>(&pattern);
  const U* from = tiles + static_cast<int64_t>(most(n, 0)) * edge * line;
  U* to = out + b * at.outer + static_cast<int64_t>(row) * edge * at.row + column * at.column;
  for (int k = static_cast<int>(threadIdx.x); k < edge * line; k += static_cast<int>(blockDim.x)) to[k / line * at.row + k % line] = n < 0 ? fill : from[k];
}

struct Strides {
  int64_t outer, channel, row, column;
};

Strides strides_of(const View& view) { return {view.strides[0], view.strides[1], view.strides[2], view.strides[3]}; }

template <class U>
__global__ void __launch_bounds__(kThreads) pack_elements_kernel(Plan plan, const U* x, Strides at, U* out, int32_t edge, int32_t channels) {
  const int64_t n = blockIdx.x, size = static_cast<int64_t>(edge) * edge * channels;
  int32_t b, r, c;
  plan.place_of(n, &b, &r, &c);
  const U* from = x + b * at.outer + static_cast<int64_t>(r) * edge * at.row + static_cast<int64_t>(c) * edge * at.column;
  for (int k = static_cast<int>(threadIdx.x); k < size; k += static_cast<int>(blockDim.x)) {
    const int position = k / channels;
    out[n * size + k] = from[position / edge * at.row + position % edge * at.column + k % channels * at.channel];
  }
}

template <class U>
__global__ void __launch_bounds__(kThreads) unpack_elements_kernel(Plan plan, const U* tiles, int32_t count, Strides at, U* out, int32_t edge, int32_t channels, U fill) {
  const int32_t column = static_cast<int32_t>(blockIdx.x % plan.columns), row = static_cast<int32_t>(blockIdx.x / plan.columns % plan.rows);
  const int32_t b = static_cast<int32_t>(blockIdx.x / plan.columns / plan.rows), size = edge * edge * channels;
  const int32_t n = plan.tile_at(b, row, column, count);
  const U* from = tiles + most(n, 0) * at.outer;
  const int64_t width = static_cast<int64_t>(plan.columns) * edge, top = (static_cast<int64_t>(b) * plan.rows + row) * edge;
  for (int k = static_cast<int>(threadIdx.x); k < size; k += static_cast<int>(blockDim.x)) {
    const int position = k / channels, i = position / edge, j = position % edge;
    out[((top + i) * width + static_cast<int64_t>(column) * edge + j) * channels + k % channels] =
        n < 0 ? fill : from[i * at.row + j * at.column + k % channels * at.channel];
  }
}

// The widest unit of 1, 2, 4, 8 or 16 bytes that divides all of these.
int64_t unit_of(std::initializer_list<int64_t> bytes) {
  int64_t all = 16;
  for (int64_t number : bytes) all |= number;
  return all & -all;
}

int64_t address(const View& view) { return static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(view.data)); }

// Calls function(U{}) for a unit of so many bytes.
template <class Function>
void with_unit(int64_t bytes, const Function& function) {
  switch (bytes) {
    case 1: return function(uint8_t{});
    case 2: return function(uint16_t{});
    case 4: return function(uint32_t{});
    case 8: return function(uint64_t{});
    default: return function(Unit16{});
  }
}

int threads_for(int64_t items) { return static_cast<int>(most<int64_t>(kWarp, least<int64_t>(kThreads, ceil_div<int64_t>(items, kWarp) * kWarp))); }

void check_size(const char* op, int64_t edge, int64_t channels) {
  if (edge > INT16_MAX || channels > INT32_MAX || edge * edge * channels > INT32_MAX - kThreads) fail("%s: a tile has more than 2^31 elements", op);
}

// 16 bytes of the fill value.
Unit16 pattern_of(double fill, DType dtype) {
  const float single = static_cast<float>(fill);
  uint64_t bits = 0;
  uint32_t word;
  std::memcpy(&word, &single, 4);
  switch (dtype) {
    case DType::kFloat64: std::memcpy(&bits, &fill, 8); break;
    case DType::kFloat32: case DType::kComplex64: bits = word; break;
    case DType::kBFloat16: bits = bfloat16_bits(single); break;
    case DType::kFloat16: bits = half_bits(single); break;
    case DType::kBool: bits = fill != 0; break;
    default: bits = static_cast<uint64_t>(static_cast<int64_t>(fill)); break;
  }
  const int64_t size = item_size(dtype);
  Unit16 pattern;
  for (int64_t at = 0; at < 16; at += size) std::memcpy(reinterpret_cast<char*>(&pattern) + at, &bits, static_cast<size_t>(size));
  return pattern;
}

}  // namespace

void pack_tiles(const View& x, const View& coords, const View& slots, const View& out, int64_t device, int64_t stream) {
  const char* op = "pack_tiles";
  check(op, x, 4);
  check(op, out, 4, x.dtype);
  check_channels_last(op, out);
  check_plan_shape(op, coords, slots);
  const int64_t tiles = coords.shape[0], channels = x.shape[1], edge = out.shape[2], size = item_size(x.dtype), line = edge * channels * size;
  if (out.shape[0] != tiles || out.shape[1] != channels || out.shape[3] != edge || x.shape[0] != slots.shape[0] || x.shape[2] != slots.shape[1] * edge ||
      x.shape[3] != slots.shape[2] * edge)
    fail("%s: x does not divide into the tiles of the plan", op);
  check_size(op, edge, channels);
  if (line == 0) return;
  const Place place(device, stream);
  const Plan plan(coords, slots);
  if ((channels == 1 || x.strides[1] == 1) && x.strides[3] == channels) {
    const int64_t unit = unit_of({address(x), address(out), x.strides[0] * size, x.strides[2] * size, line});
    const Lines at{x.strides[0] * size / unit, x.strides[2] * size / unit, line / unit};
    return with_unit(unit, [&](auto tag) {
      using U = decltype(tag);
      launch(op, place, tiles, 1, threads_for(edge * line / unit), pack_lines_kernel<U>, plan, pointer<U>(x), at, pointer<U>(out), edge, line / unit);
    });
  }
  with_unit(size, [&](auto tag) {
    using U = decltype(tag);
    if constexpr (sizeof(U) <= 8)
      launch(op, place, tiles, 1, threads_for(edge * edge * channels), pack_elements_kernel<U>, plan, pointer<U>(x), strides_of(x), pointer<U>(out), edge, channels);
  });
}

void unpack_tiles(const View& tiles, const View& slots, double fill, const View& out, int64_t device, int64_t stream) {
  const char* op = "unpack_tiles";
  check(op, tiles, 4);
  check(op, out, 4, tiles.dtype);
  check(op, slots, 3, DType::kInt32);
  check_contiguous(op, slots);
  check_channels_last(op, out);
  const int64_t batch = slots.shape[0], rows = slots.shape[1], columns = slots.shape[2];
  const int64_t channels = tiles.shape[1], edge = tiles.shape[2], size = item_size(tiles.dtype), line = edge * channels * size;
  if (tiles.shape[3] != edge || out.shape[0] != batch || out.shape[1] != channels || out.shape[2] != rows * edge || out.shape[3] != columns * edge)
    fail("%s: out does not have the shape of the dense map", op);
  check_size(op, edge, channels);
  if (line == 0) return;
  const Place place(device, stream);
  const Plan plan(View{}, slots);
  const Unit16 pattern = pattern_of(fill, tiles.dtype);
  if (is_channels_last(tiles)) {
    const int64_t unit = unit_of({address(tiles), address(out), line});
    const Lines at{rows * edge * columns * line / unit, columns * line / unit, line / unit};
    return with_unit(unit, [&](auto tag) {
      using U = decltype(tag);
      launch(op, place, batch * rows * columns, 1, threads_for(edge * line / unit), unpack_lines_kernel<U>, plan, pointer<U>(tiles), tiles.shape[0], pointer<U>(out), at,
             edge, line / unit, pattern);
    });
  }
  with_unit(size, [&](auto tag) {
    using U = decltype(tag);
    if constexpr (sizeof(U) <= 8) {
      U value;
      std::memcpy(&value, &pattern, sizeof value);
      launch(op, place, batch * rows * columns, 1, threads_for(edge * edge * channels), unpack_elements_kernel<U>, plan, pointer<U>(tiles), tiles.shape[0], strides_of(tiles),
             pointer<U>(out), edge, channels, value);
    }
  });
}

}  // namespace cuda
}  // namespace mwm
