// Pooling over packed tiles: a thread per position and run of channels. The backward asks, for each input position, the windows that
// see it, in the order of the CPU's kernel, so no two threads add to one place.
#include "device.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kThreads = 128;

// As in ops/pool_geometry.py, plus the plan and the sizes of the dense maps.
struct Pool {
  Plan plan;
  bool max, count_include_pad;
  int32_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, left, right, top, bottom, divisor;
  int32_t tiles, channels, edge, out_edge_h, out_edge_w, height, width, out_height, out_width;

  // Where a position of the dense input is stored, counted in rows of channels; kHidden, or less outside the image.
  static constexpr int64_t kHidden = -1;
  // The position is (i, j) of the tile at (row, column) of the image, and may lie in any other tile.
  __device__ int64_t input(int32_t image, int32_t row, int32_t column, int32_t i, int32_t j) const {
    const int32_t down = floor_div(i, edge), across = floor_div(j, edge);
    const int32_t n = plan.tile_at(image, row + down, column + across, tiles);
    return n < 0 ? n : (static_cast<int64_t>(n) * edge + i - down * edge) * edge + j - across * edge;
  }
  // The same of a position of the dense output, which exists; kHidden where it is hidden.
  __device__ int64_t output(int32_t image, int32_t r, int32_t c) const {
    const int32_t row = r / out_edge_h, column = c / out_edge_w;
    const int32_t n = plan.tile_at(image, row, column, tiles);
    return n < 0 ? kHidden : (static_cast<int64_t>(n) * out_edge_h + r - row * out_edge_h) * out_edge_w + c - column * out_edge_w;
  }
  __device__ bool in_padding(int32_t r, int32_t c) const { return r >= -top && r < height + bottom && c >= -left && c < width + right; }

  // Number of positions along one side that torch counts for a window that begins at `begin`.
  __device__ static int32_t span(int32_t begin, int32_t kernel, int32_t size, int32_t after, bool with_pad) {
    const int32_t end = least(begin + kernel, size + after);
    return with_pad ? end - begin : least(end, size) - most(begin, 0);
  }
  __device__ float divide_by(int32_t out_r, int32_t out_c) const {
    if (divisor) return static_cast<float>(divisor);
    return static_cast<float>(static_cast<int64_t>(span(out_r * stride_h - top, kernel_h, height, bottom, count_include_pad)) *
                              span(out_c * stride_w - left, kernel_w, width, right, count_include_pad));
  }
};

// Which position and channels a thread has: `at` counts rows of channels of the tiles that are written.
template <int kChannels>
struct Item {
  int64_t at;
  int32_t channel, image, row, column, i, j;

  __device__ bool find(const Pool& p, int32_t edge_h, int32_t edge_w) {
    const int32_t runs = p.channels / kChannels;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    at = item / runs;
    channel = static_cast<int32_t>(item - at * runs) * kChannels;
    const int64_t n = at / (edge_h * edge_w);
    if (n >= p.tiles) return false;
    const int32_t position = static_cast<int32_t>(at - n * (edge_h * edge_w));
    i = position / edge_w, j = position % edge_w;
    p.plan.place_of(n, &image, &row, &column);
    return true;
  }
};

template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads) max_pool_kernel(Pool p, const T* x, float pad_value, T* out, int16_t* taps) {
  Item<kChannels> item;
  if (!item.find(p, p.out_edge_h, p.out_edge_w)) return;
  const float lowest = -INFINITY;
  float best[kChannels];
  int16_t where[kChannels];
  MWM_UNROLL
  for (int k = 0; k < kChannels; ++k) best[k] = lowest, where[k] = -1;
  for (int u = 0; u < p.kernel_h; ++u)
    for (int v = 0; v < p.kernel_w; ++v) {
      const int32_t i = item.i * p.stride_h - p.top + u * p.dilation_h, j = item.j * p.stride_w - p.left + v * p.dilation_w;
      const int64_t at = p.input(item.image, item.row, item.column, i, j);
      const bool real = at >= 0, first = u == 0 && v == 0 && real;
      const int16_t mark = static_cast<int16_t>(real ? u * p.kernel_w + v : -1);
      const float other = at == Pool::kHidden ? 0.0f : p.in_padding(item.row * p.edge + i, item.column * p.edge + j) ? pad_value : lowest;
      Pack<T, kChannels> values{};
      if (real) values = *reinterpret_cast<const Pack<T, kChannels>*>(x + at * p.channels + item.channel);
      MWM_UNROLL
      for (int k = 0; k < kChannels; ++k) {
        const float value = real ? widen(values.item[k]) : other;
        // The first position stands until a larger one comes; NaN always wins, as in torch.
        if (first || best[k] < value || value != value) best[k] = value, where[k] = mark;
      }
    }
  Pack<T, kChannels> result;
  Pack<int16_t, kChannels> marks;
  MWM_UNROLL
  for (int k = 0; k < kChannels; ++k) result.item[k] = narrow<T>(best[k]), marks.item[k] = where[k];
  *reinterpret_cast<Pack<T, kChannels>*>(out + item.at * p.channels + item.channel) = result;
  *reinterpret_cast<Pack<int16_t, kChannels>*>(taps + item.at * p.channels + item.channel) = marks;
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads) average_pool_kernel(Pool p, const T* x, T* out) {
  Item<kChannels> item;
  if (!item.find(p, p.out_edge_h, p.out_edge_w)) return;
  float sum[kChannels] = {};
  for (int u = 0; u < p.kernel_h; ++u)
    for (int v = 0; v < p.kernel_w; ++v) {
      const int64_t at = p.input(item.image, item.row, item.column, item.i * p.stride_h - p.top + u, item.j * p.stride_w - p.left + v);
      if (at < 0) continue;
      const Pack<T, kChannels> values = *reinterpret_cast<const Pack<T, kChannels>*>(x + at * p.channels + item.channel);
      MWM_UNROLL
      for (int k = 0; k < kChannels; ++k) sum[k] += widen(values.item[k]);
    }
  const float divisor = p.divide_by(item.row * p.out_edge_h + item.i, item.column * p.out_edge_w + item.j);
  Pack<T, kChannels> result;
  MWM_UNROLL
  for (int k = 0; k < kChannels; ++k) result.item[k] = narrow<T>(sum[k] / divisor);
  *reinterpret_cast<Pack<T, kChannels>*>(out + item.at * p.channels + item.channel) = result;
}

template <class T, int kChannels>
__global__ void __launch_bounds__(kThreads) pool_backward_kernel(Pool p, const T* grad, const int16_t* taps, T* out) {
  Item<kChannels> item;
  if (!item.find(p, p.edge, p.edge)) return;
  const int32_t r = item.row * p.edge + item.i + p.top, c = item.column * p.edge + item.j + p.left;
  float sum[kChannels] = {};
  for (int u = p.kernel_h - 1; u >= 0; --u) {
    const int32_t down = r - u * p.dilation_h;
    if (down < 0 || down % p.stride_h || down / p.stride_h >= p.out_height) continue;
    for (int v = p.kernel_w - 1; v >= 0; --v) {
      const int32_t across = c - v * p.dilation_w;
      if (across < 0 || across % p.stride_w || across / p.stride_w >= p.out_width) continue;
      const int64_t row = p.output(item.image, down / p.stride_h, across / p.stride_w);
      if (row < 0) continue;
      const Pack<T, kChannels> values = *reinterpret_cast<const Pack<T, kChannels>*>(grad + row * p.channels + item.channel);
      if (p.max) {
        const Pack<int16_t, kChannels> marks = *reinterpret_cast<const Pack<int16_t, kChannels>*>(taps + row * p.channels + item.channel);
        MWM_UNROLL
        for (int k = 0; k < kChannels; ++k) sum[k] += marks.item[k] == u * p.kernel_w + v ? widen(values.item[k]) : 0.0f;
      } else {
        const float divisor = p.divide_by(down / p.stride_h, across / p.stride_w);
        MWM_UNROLL
        for (int k = 0; k < kChannels; ++k) sum[k] += widen(values.item[k]) / divisor;
      }
    }
  }
  Pack<T, kChannels> result;
  MWM_UNROLL
  for (int k = 0; k < kChannels; ++k) result.item[k] = narrow<T>(sum[k]);
  *reinterpret_cast<Pack<T, kChannels>*>(out + item.at * p.channels + item.channel) = result;
}

Pool pool_of(const char* op, const Ints& g, const View& x, const View& out, const View& coords, const View& slots) {
  if (g.count != 14) fail("%s: geometry must have 14 numbers", op);
  for (int i = 0; i < g.count; ++i)
    if (g.values[i] < 0 || g.values[i] > (1 << 24)) fail("%s: geometry is out of range", op);
  check_plan_shape(op, coords, slots);
  const int64_t edge = x.shape[2];
  auto number = [&](int i) { return static_cast<int32_t>(g.values[i]); };
  Pool p{Plan(coords, slots), number(0) != 0, number(12) != 0, number(1), number(2), number(3), number(4), number(5), number(6), number(7), number(8), number(9), number(10),
         number(13), static_cast<int32_t>(x.shape[0]), static_cast<int32_t>(x.shape[1]), static_cast<int32_t>(edge), static_cast<int32_t>(out.shape[2]),
         static_cast<int32_t>(out.shape[3]), 0, 0, 0, 0};
  if (p.kernel_h < 1 || p.kernel_w < 1 || p.stride_h < 1 || p.stride_w < 1 || p.dilation_h < 1 || p.dilation_w < 1 || p.kernel_h * int64_t{p.kernel_w} > 32767 ||
      p.dilation_h > 32767 || p.dilation_w > 32767)
    fail("%s: kernel, stride and dilation must be positive and below 32768", op);
  if (x.shape[3] != edge || p.out_edge_h * int64_t{p.stride_h} != edge || p.out_edge_w * int64_t{p.stride_w} != edge || coords.shape[0] != x.shape[0] ||
      out.shape[0] != x.shape[0] || out.shape[1] != x.shape[1] || x.shape[1] > INT32_MAX || edge > 32767)
    fail("%s: the tiles do not fit plan and stride", op);
  if (int64_t{p.plan.rows} * edge > (1 << 28) || int64_t{p.plan.columns} * edge > (1 << 28)) fail("%s: the dense map has a side of more than 2^28", op);
  p.height = p.plan.rows * p.edge, p.width = p.plan.columns * p.edge;
  p.out_height = p.plan.rows * p.out_edge_h, p.out_width = p.plan.columns * p.out_edge_w;
  return p;
}

void check_taps(const char* op, const View& taps, const View& like) {
  check_tiles(op, taps, DType::kInt16);
  for (int i = 0; i < 4; ++i)
    if (taps.shape[i] != like.shape[i]) fail("%s: taps must have the shape of the output", op);
}

// Calls function(T{}, count) with the number of channels that one thread takes, as a type.
template <class Function>
void with_run(const char* op, const Pool& p, const View& x, const View& out, const View& taps, const Function& function) {
  with_float(op, x.dtype, [&](auto tag) {
    using T = decltype(tag);
    constexpr int kRun = sizeof(T) == 2 ? 8 : 2;
    const bool whole = p.channels % kRun == 0 && aligned(x, kRun * sizeof(T)) && aligned(out, kRun * sizeof(T)) && (!p.max || aligned(taps, kRun * 2));
    if (whole) function(tag, std::integral_constant<int, kRun>{});
    else function(tag, std::integral_constant<int, 1>{});
  });
}

int64_t blocks_of(const Pool& p, int64_t positions, int run) { return ceil_div<int64_t>(p.tiles * positions * (p.channels / run), kThreads); }

}  // namespace

void tile_pool_forward(const View& x, const View& coords, const View& slots, const Ints& geometry, double pad_value, const View& out, const View& taps, int64_t device,
                       int64_t stream) {
  const char* op = "tile_pool";
  check_tiles(op, x, x.dtype);
  check_tiles(op, out, x.dtype);
  const Pool p = pool_of(op, geometry, x, out, coords, slots);
  if (p.max) check_taps(op, taps, out);
  const Place place(device, stream);
  with_run(op, p, x, out, taps, [&](auto tag, auto count) {
    using T = decltype(tag);
    constexpr int kRun = decltype(count)::value;
    const int64_t blocks = blocks_of(p, int64_t{p.out_edge_h} * p.out_edge_w, kRun);
    if (p.max) launch(op, place, blocks, 1, kThreads, max_pool_kernel<T, kRun>, p, pointer<T>(x), static_cast<float>(pad_value), pointer<T>(out), pointer<int16_t>(taps));
    else launch(op, place, blocks, 1, kThreads, average_pool_kernel<T, kRun>, p, pointer<T>(x), pointer<T>(out));
  });
}

void tile_pool_backward(const View& grad, const View& taps, const View& coords, const View& slots, const Ints& geometry, const View& out, int64_t device, int64_t stream) {
  const char* op = "tile_pool";
  check_tiles(op, grad, grad.dtype);
  check_tiles(op, out, grad.dtype);
  const Pool p = pool_of(op, geometry, out, grad, coords, slots);
  if (p.max) check_taps(op, taps, grad);
  const Place place(device, stream);
  with_run(op, p, grad, out, taps, [&](auto tag, auto count) {
    using T = decltype(tag);
    constexpr int kRun = decltype(count)::value;
    launch(op, place, blocks_of(p, int64_t{p.edge} * p.edge, kRun), 1, kThreads, pool_backward_kernel<T, kRun>, p, pointer<T>(grad), pointer<int16_t>(taps), pointer<T>(out));
  });
}

}  // namespace cuda
}  // namespace mwm
