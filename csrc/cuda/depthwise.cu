// Depthwise convolution and its derivative in the input.
//
// Usual shapes (3x3, 5x5, 7x7 on tiles of edge 1, 2, 4, 8): a block has 32 channels of some tiles, a thread two channels of one or two rows of
// a tile. It walks down the rows that its window touches, keeps one in registers, and adds it to each of its outputs; hidden rows cost
// nothing. Filters and the tiles' neighbours lie in shared memory. The derivative is the same with the taps in reverse order.
// Other shapes: a thread per output, which asks the plan at each tap. Sums in float32, in the order of the taps.
#include "depthwise.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWorkers = kThreads / kPairs;

struct Problem {
  Plan plan;
  Window window;
  int32_t sources, channels;
  int64_t targets;
  bool flip;
};

template <int kEdge>
struct Share {
  // Rows of one thread: two where a tile is small, so that a row that is loaded serves more outputs.
  static constexpr int kRows = kEdge == 8 || kEdge == 1 ? 1 : 2, kPerTile = kEdge / kRows, kTiles = kWorkers / kPerTile;
};

template <class T, int kKernel, int kEdge>
__global__ void __launch_bounds__(kThreads) depthwise_kernel(Problem p, const T* x, const T* weight, const T* bias, int32_t passes, T* out) {
  using R = Reach<kKernel, kEdge>;
  using S = Share<kEdge>;
  constexpr int kTaps = kKernel * kKernel, kStep = kBlockChannels + 2;  // two more: fewer threads meet in one bank
  alignas(8) __shared__ float filters[kTaps * kStep];  // read in pairs
  __shared__ int32_t table[S::kTiles * R::kSide * R::kSide];
  const int thread = static_cast<int>(threadIdx.x), pair = thread % kPairs, worker = thread / kPairs;
  const int32_t first_channel = static_cast<int32_t>(blockIdx.y) * kBlockChannels, channel = first_channel + 2 * pair;
  for (int item = thread; item < kTaps * kBlockChannels; item += kThreads) {
    const int c = item / kTaps, tap = item - c * kTaps, source = p.flip ? kTaps - 1 - tap : tap;
    filters[tap * kStep + c] =
        first_channel + c < p.channels
            ? widen(weight[(first_channel + c) * p.window.weight_channel + source / kKernel * p.window.weight_row + source % kKernel * p.window.weight_column])
            : 0.0f;
  }
  const float2 start = bias && channel < p.channels ? load_pair(bias + channel) : make_float2(0.0f, 0.0f);
  const int tile = worker / S::kPerTile, top = worker % S::kPerTile * S::kRows;
  for (int pass = 0; pass < passes; ++pass) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * passes + pass) * S::kTiles, n = first + tile;
    __syncthreads();
    find_neighbours<R::kSide>(p.plan, first, S::kTiles, p.targets, p.sources, table);
    __syncthreads();
    if (n >= p.targets || channel >= p.channels) continue;
    float2 sum[S::kRows][kEdge];
    MWM_UNROLL
    for (int o = 0; o < S::kRows; ++o) {
      MWM_UNROLL
      for (int j = 0; j < kEdge; ++j) sum[o][j] = start;
    }
    MWM_UNROLL_BY(1)
    for (int row = -R::kPad; row < S::kRows + R::kPad; ++row) {
      float2 window[kEdge + 2 * R::kPad];
      if (!load_window<T, kKernel, kEdge>(x, table + tile * R::kSide * R::kSide, top + row, p.channels, channel, window)) continue;
      MWM_UNROLL
      for (int o = 0; o < S::kRows; ++o) {
        const int u = row + R::kPad - o;
        if (u < 0 || u >= kKernel) continue;
        MWM_UNROLL
        for (int v = 0; v < kKernel; ++v) {
          const float2 w = *reinterpret_cast<const float2*>(filters + (u * kKernel + v) * kStep + 2 * pair);
          MWM_UNROLL
          for (int j = 0; j < kEdge; ++j) sum[o][j].x += w.x * window[j + v].x, sum[o][j].y += w.y * window[j + v].y;
        }
      }
    }
    MWM_UNROLL
    for (int o = 0; o < S::kRows; ++o) {
      T* to = out + (n * kEdge + top + o) * kEdge * p.channels + channel;
      MWM_UNROLL
      for (int j = 0; j < kEdge; ++j) store_pair(to + j * p.channels, sum[o][j]);
    }
  }
}

// Any window. Forward: position o of the target reads o * stride - padding + u * dilation; adjoint: what reads it, where that divides.
template <class T>
__global__ void __launch_bounds__(kThreads) depthwise_any_kernel(Problem p, bool adjoint, int32_t edge, int32_t source_edge, const T* x, const T* weight, const T* bias, T* out) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, at = item / p.channels, n = at / (edge * edge);
  if (n >= p.targets) return;
  const int32_t channel = static_cast<int32_t>(item - at * p.channels), position = static_cast<int32_t>(at - n * (edge * edge)), i = position / edge, j = position % edge;
  const Window& w = p.window;
  int32_t image, row, column;
  p.plan.place_of(n, &image, &row, &column);
  float sum = bias ? widen(bias[channel]) : 0.0f;
  for (int u = 0; u < w.kernel_h; ++u) {
    int32_t r = adjoint ? i + w.top - u * w.dilation_h : i * w.stride - w.top + u * w.dilation_h;
    if (adjoint) {
      if (r - floor_div(r, w.stride) * w.stride != 0) continue;
      r = floor_div(r, w.stride);
    }
    const int32_t down = floor_div(r, source_edge);
    for (int v = 0; v < w.kernel_w; ++v) {
      int32_t c = adjoint ? j + w.left - v * w.dilation_w : j * w.stride - w.left + v * w.dilation_w;
      if (adjoint) {
        if (c - floor_div(c, w.stride) * w.stride != 0) continue;
        c = floor_div(c, w.stride);
      }
      const int32_t across = floor_div(c, source_edge), slot = p.plan.tile_at(image, row + down, column + across, p.sources);
      if (slot < 0) continue;
      const int64_t source = (static_cast<int64_t>(slot) * source_edge + r - down * source_edge) * source_edge + c - across * source_edge;
      sum += widen(x[source * p.channels + channel]) * widen(weight[channel * w.weight_channel + u * w.weight_row + v * w.weight_column]);
    }
  }
  out[item] = narrow<T>(sum);
}

void run(const char* op, const View& x, const View& weight, const View& bias, const View& coords, const View& slots, const Ints& geometry, bool adjoint, const View& out,
         int64_t device, int64_t stream) {
  const Window window = window_of(op, geometry, weight, x, coords, slots, adjoint ? out : x, adjoint ? x : out);
  if (out.shape[0] != coords.shape[0]) fail("%s: the output must have the plan's number of tiles", op);
  if (!is_none(bias)) {
    check(op, bias, 1, x.dtype);
    check_contiguous(op, bias);
    if (bias.shape[0] != x.shape[1]) fail("%s: bias must be [C]", op);
  }
  const int64_t channels = x.shape[1], targets = out.shape[0], edge = out.shape[2];
  if (channels == 0 || targets == 0) return;
  const Place place(device, stream);
  const Problem p{Plan(coords, slots), window, static_cast<int32_t>(x.shape[0]), static_cast<int32_t>(channels), targets, adjoint};
  with_float(op, x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* bias_data = is_none(bias) ? nullptr : pointer<T>(bias);
    const bool pairs = in_pairs(channels, {&x, &out}) && (is_none(bias) || aligned(bias, 2 * sizeof(T)));
    const bool done = pairs && with_usual_shape(window, edge, [&](auto kernel, auto tile_edge) {
      constexpr int kKernel = decltype(kernel)::value, kEdge = decltype(tile_edge)::value;
      const int64_t blocks_y = ceil_div<int64_t>(channels, kBlockChannels), at_once = Share<kEdge>::kTiles;
      // Several passes spare reading the filters again, as long as there are blocks for a large GPU. Results do not depend on it.
      const int64_t passes = most<int64_t>(1, least<int64_t>(8, targets * blocks_y / (at_once * 1056)));
      launch(op, place, ceil_div<int64_t>(targets, at_once * passes), blocks_y, kThreads, depthwise_kernel<T, kKernel, kEdge>, p, pointer<T>(x), pointer<T>(weight), bias_data,
             passes, pointer<T>(out));
    });
    if (!done)
      launch(op, place, ceil_div<int64_t>(targets * edge * edge * channels, kThreads), 1, kThreads, depthwise_any_kernel<T>, p, adjoint, edge, x.shape[2], pointer<T>(x),
             pointer<T>(weight), bias_data, pointer<T>(out));
  });
}

}  // namespace

void depthwise_forward(const View& x, const View& weight, const View& bias, const View& coords, const View& slots, const Ints& geometry, const View& out, int64_t device,
                       int64_t stream) {
  run("depthwise_forward", x, weight, bias, coords, slots, geometry, false, out, device, stream);
}

void depthwise_grad_input(const View& grad, const View& weight, const View& coords, const View& slots, const Ints& geometry, const View& out, int64_t device, int64_t stream) {
  run("depthwise_grad_input", grad, weight, View{}, coords, slots, geometry, true, out, device, stream);
}

}  // namespace cuda
}  // namespace mwm
