// Derivative of depthwise convolution in its filters, in two stages of fixed order: sums over fixed shares of the tiles, then over the shares.
//
// Usual shapes: a block has 32 channels and one share, a thread two channels and one row of taps. Of each tile it reads the rows of the
// gradient and the rows of the input that this row of taps sees, one of either in registers at a time; groups of threads take the share's
// tiles in turn. A tile is summed on its own first. Other shapes: a block per tap, 32 channels and share.
#include "depthwise.h"

namespace mwm {
namespace cuda {
namespace {

struct Problem {
  Plan plan;
  Window window;
  int32_t sources, channels;
  int64_t targets;
  int32_t splits;

  __device__ int64_t first(int64_t split) const { return targets * split / splits; }
};

template <int kKernel>
struct Share {
  static constexpr int kGroups = kKernel == 3 ? 4 : 2, kThreads = kPairs * kKernel * kGroups;
};

template <class T, int kKernel, int kEdge>
__global__ void __launch_bounds__(Share<kKernel>::kThreads) weight_kernel(Problem p, const T* grad, const T* x, float* sums) {
  using R = Reach<kKernel, kEdge>;
  using S = Share<kKernel>;
  constexpr int kTaps = kKernel * kKernel, kTurn = kEdge == 8 ? 1 : kEdge == 4 ? 2 : 4;  // tiles of a group between barriers
  __shared__ int32_t table[S::kGroups * kTurn * R::kSide * R::kSide];
  __shared__ float2 parts[S::kGroups - 1][kTaps * kPairs];
  const int thread = static_cast<int>(threadIdx.x), pair = thread % kPairs, u = thread / kPairs % kKernel, group = thread / (kPairs * kKernel);
  const int32_t channel = static_cast<int32_t>(blockIdx.y) * kBlockChannels + 2 * pair;
  const int64_t split = blockIdx.x, last = p.first(split + 1);
  const bool live = channel < p.channels;
  float2 total[kKernel];
  MWM_UNROLL
  for (int v = 0; v < kKernel; ++v) total[v] = make_float2(0.0f, 0.0f);
  for (int64_t first = p.first(split); first < last; first += S::kGroups * kTurn) {
    __syncthreads();
    find_neighbours<R::kSide>(p.plan, first, S::kGroups * kTurn, last, p.sources, table);
    __syncthreads();
    for (int turn = 0; turn < kTurn; ++turn) {
      const int tile = group * kTurn + turn;
      const int64_t n = first + tile;
      if (n >= last || !live) break;
      float2 sum[kKernel];
      MWM_UNROLL
      for (int v = 0; v < kKernel; ++v) sum[v] = make_float2(0.0f, 0.0f);
      MWM_UNROLL_BY(1)
      for (int i = 0; i < kEdge; ++i) {
        float2 window[kEdge + 2 * R::kPad];
        if (!load_window<T, kKernel, kEdge>(x, table + tile * R::kSide * R::kSide, i + u - R::kPad, p.channels, channel, window)) continue;
        const T* from = grad + (n * kEdge + i) * kEdge * p.channels + channel;
        MWM_UNROLL
        for (int j = 0; j < kEdge; ++j) {
          const float2 g = load_pair(from + j * p.channels);
          MWM_UNROLL
          for (int v = 0; v < kKernel; ++v) sum[v].x += g.x * window[j + v].x, sum[v].y += g.y * window[j + v].y;
        }
      }
      MWM_UNROLL
      for (int v = 0; v < kKernel; ++v) total[v].x += sum[v].x, total[v].y += sum[v].y;
    }
  }
  if (group > 0) {
    MWM_UNROLL
    for (int v = 0; v < kKernel; ++v) parts[group - 1][(u * kKernel + v) * kPairs + pair] = total[v];
  }
  __syncthreads();
  if (group > 0 || !live) return;
  MWM_UNROLL
  for (int v = 0; v < kKernel; ++v) {
    MWM_UNROLL
    for (int other = 0; other < S::kGroups - 1; ++other) {
      const float2 more = parts[other][(u * kKernel + v) * kPairs + pair];
      total[v].x += more.x, total[v].y += more.y;
    }
    float* to = sums + (split * kTaps + u * kKernel + v) * p.channels + channel;
    to[0] = total[v].x, to[1] = total[v].y;
  }
}

constexpr int kGroups = 8, kThreads = kGroups * kWarp;

template <class T>
__global__ void __launch_bounds__(kThreads) weight_any_kernel(Problem p, int32_t edge, int32_t source_edge, const T* grad, const T* x, float* sums) {
  __shared__ float parts[kGroups][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = static_cast<int>(threadIdx.x) / kWarp;
  const Window& w = p.window;
  const int32_t channel = static_cast<int32_t>(blockIdx.y) * kWarp + lane, taps = w.kernel_h * w.kernel_w;
  const int64_t split = blockIdx.x / taps;
  const int32_t tap = static_cast<int32_t>(blockIdx.x - split * taps), u = tap / w.kernel_w, v = tap % w.kernel_w;
  float total = 0;
  if (channel < p.channels)
    for (int64_t n = p.first(split) + group; n < p.first(split + 1); n += kGroups) {
      int32_t image, row, column;
      p.plan.place_of(n, &image, &row, &column);
      float sum = 0;
      for (int i = 0; i < edge; ++i) {
        const int32_t r = i * w.stride - w.top + u * w.dilation_h, down = floor_div(r, source_edge);
        for (int j = 0; j < edge; ++j) {
          const int32_t c = j * w.stride - w.left + v * w.dilation_w, across = floor_div(c, source_edge);
          const int32_t slot = p.plan.tile_at(image, row + down, column + across, p.sources);
          if (slot < 0) continue;
          const int64_t source = (static_cast<int64_t>(slot) * source_edge + r - down * source_edge) * source_edge + c - across * source_edge;
          sum += widen(grad[((n * edge + i) * edge + j) * p.channels + channel]) * widen(x[source * p.channels + channel]);
        }
      }
      total += sum;
    }
  parts[group][lane] = total;
  __syncthreads();
  if (group != 0 || channel >= p.channels) return;
  for (int other = 1; other < kGroups; ++other) total += parts[other][lane];
  sums[(split * taps + tap) * p.channels + channel] = total;
}

// out[c, 0, u, v] = sum over the shares; groups of threads take shares in turn.
template <class T>
__global__ void __launch_bounds__(kThreads) join_kernel(Problem p, const float* sums, T* out) {
  __shared__ double parts[kGroups][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, group = static_cast<int>(threadIdx.x) / kWarp;
  const Window& w = p.window;
  const int32_t channel = static_cast<int32_t>(blockIdx.y) * kWarp + lane, taps = w.kernel_h * w.kernel_w, tap = static_cast<int32_t>(blockIdx.x);
  double total = 0;
  if (channel < p.channels) {
    MWM_UNROLL_BY(4)
    for (int split = group; split < p.splits; split += kGroups) total += static_cast<double>(sums[(static_cast<int64_t>(split) * taps + tap) * p.channels + channel]);
  }
  parts[group][lane] = total;
  __syncthreads();
  if (group != 0 || channel >= p.channels) return;
  for (int other = 1; other < kGroups; ++other) total += parts[other][lane];
  out[channel * w.weight_channel + tap / w.kernel_w * w.weight_row + tap % w.kernel_w * w.weight_column] = narrow<T>(static_cast<float>(total));
}

}  // namespace

void depthwise_grad_weight(const View& grad, const View& x, const View& coords, const View& slots, const Ints& geometry, const View& sums, const View& out, int64_t device,
                           int64_t stream) {
  const char* op = "depthwise_grad_weight";
  const Window window = window_of(op, geometry, out, x, coords, slots, x, grad);
  const int64_t channels = x.shape[1], taps = int64_t{window.kernel_h} * window.kernel_w, splits = sums.ndim == 2 ? sums.shape[0] : 0;
  if (grad.shape[0] != coords.shape[0]) fail("%s: grad must have the plan's number of tiles", op);
  check(op, sums, 2, DType::kFloat32);
  check_contiguous(op, sums);
  if (splits < 1 || splits > INT32_MAX || sums.shape[1] != taps * channels) fail("%s: sums must be [splits, filter elements]", op);
  if (channels == 0) return;
  const Place place(device, stream);
  const Problem p{Plan(coords, slots), window, static_cast<int32_t>(x.shape[0]), static_cast<int32_t>(channels), grad.shape[0], static_cast<int32_t>(splits)};
  const int64_t blocks_y = ceil_div<int64_t>(channels, kBlockChannels);
  static_assert(kBlockChannels == kWarp);
  with_float(op, x.dtype, [&](auto tag) {
    using T = decltype(tag);
    const bool done = in_pairs(channels, {&x, &grad}) && with_usual_shape(window, x.shape[2], [&](auto kernel, auto edge) {
      constexpr int kKernel = decltype(kernel)::value, kEdge = decltype(edge)::value;
      launch(op, place, splits, blocks_y, Share<kKernel>::kThreads, weight_kernel<T, kKernel, kEdge>, p, pointer<T>(grad), pointer<T>(x), pointer<float>(sums));
    });
    if (!done)
      launch(op, place, splits * taps, blocks_y, kThreads, weight_any_kernel<T>, p, grad.shape[2], x.shape[2], pointer<T>(grad), pointer<T>(x), pointer<float>(sums));
    launch(op, place, taps, blocks_y, kThreads, join_kernel<T>, p, pointer<float>(sums), pointer<T>(out));
  });
}

}  // namespace cuda
}  // namespace mwm
