// The derivative of batch norm with a residual and a ReLU: two sums of each channel, in fixed shares that are then added in order, and one
// pass that writes the gradients of x and of the residual.
#include "batch_norm.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kJoinLanes = 8, kJoinGroups = kThreads / kJoinLanes;

// Sums of g and of g * (x - mean) of each share, g the gradient before the activation.
template <class T, int kVec, bool kAct>
__global__ void __launch_bounds__(kThreads) backward_sums_kernel(const T* grad, const T* x, const T* out, Norm norm, Rows size, double* sums) {
  __shared__ double parts[2][kThreads * kVec];
  constexpr int kRun = 2;
  const At at(size, kVec);
  const int64_t groups = size.groups;
  float total[kVec] = {}, product[kVec] = {};
  if (at.some) {
    float mean[kVec], slope[kVec], bias[kVec], weight[kVec];
    load_row(norm.mean, at.channel, 0.0f, mean);
    load_scale(norm.var, at.channel, norm.eps, slope);
    load_row(norm.weight, at.channel, 1.0f, weight);
    load_row(norm.bias, at.channel, 0.0f, bias);
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) slope[j] *= weight[j];
    const auto add = [&](const Pack<T, kVec>& gradient, const Pack<T, kVec>& value, const Pack<T, kVec>& result) {
      MWM_UNROLL
      for (int j = 0; j < kVec; ++j) {
        const float deviation = widen(value.item[j]) - mean[j];
        float g = widen(gradient.item[j]);
        if (kAct) g = passed(g, out ? widen(result.item[j]) : deviation * slope[j] + bias[j], norm.cap);
        total[j] += g;
        product[j] += g * deviation;
      }
    };
    int64_t row = at.first;
    for (; row + (kRun - 1) * groups < at.last; row += kRun * groups) {
      Pack<T, kVec> gradients[kRun], values[kRun], results[kRun] = {};
      MWM_UNROLL
      for (int i = 0; i < kRun; ++i) {
        const int64_t place = (row + i * groups) * size.channels + at.channel;
        gradients[i] = load<T, kVec>(grad + place);
        values[i] = load<T, kVec>(x + place);
        if (kAct && out) results[i] = load<T, kVec>(out + place);
      }
      MWM_UNROLL
      for (int i = 0; i < kRun; ++i) add(gradients[i], values[i], results[i]);
    }
    for (; row < at.last; row += groups) {
      const int64_t place = row * size.channels + at.channel;
      add(load<T, kVec>(grad + place), load<T, kVec>(x + place), kAct && out ? load<T, kVec>(out + place) : Pack<T, kVec>{});
    }
  }
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) {
    parts[0][threadIdx.x * kVec + j] = static_cast<double>(total[j]);
    parts[1][threadIdx.x * kVec + j] = static_cast<double>(product[j]);
  }
  __syncthreads();
  const int width = size.lanes * kVec;
  for (int item = static_cast<int>(threadIdx.x); item < 2 * width; item += kThreads) {
    const int which = item / width, own = item % width;
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * width + own;
    if (channel >= size.channels) continue;
    double sum = 0;
    for (int group = 0; group < size.groups; ++group) sum += parts[which][group * width + own];
    sums[(static_cast<int64_t>(blockIdx.x) * 2 + which) * size.channels + channel] = sum;
  }
}

// totals float32 [2, C]: the gradients of bias and weight.
__global__ void __launch_bounds__(kThreads) join_sums_kernel(const double* sums, const float* var, float eps, int64_t channels, int32_t shares, float* totals) {
  __shared__ double parts[kJoinGroups][kJoinLanes];
  const int lane = static_cast<int>(threadIdx.x) % kJoinLanes, group = static_cast<int>(threadIdx.x) / kJoinLanes;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kJoinLanes + lane;
  double total = 0;
  if (item < 2 * channels) {
    MWM_UNROLL_BY(4)
    for (int64_t share = group; share < shares; share += kJoinGroups) total += sums[share * 2 * channels + item];
  }
  parts[group][lane] = total;
  __syncthreads();
  if (group != 0 || item >= 2 * channels) return;
  for (int other = 1; other < kJoinGroups; ++other) total += parts[other][lane];
  if (item >= channels) total *= static_cast<double>(1.0f / sqrtf(var[item - channels] + eps));
  totals[item] = static_cast<float>(total);
}

template <class T, int kVec, bool kAct>
__global__ void __launch_bounds__(kThreads) backward_kernel(const T* grad, const T* x, const T* out, Norm norm, const float* totals, Rows size, T* grad_x, T* grad_residual) {
  constexpr int kRun = 2;
  const At at(size, kVec);
  if (!at.some) return;
  // grad_x = slope * (g - mean of g - x_hat * mean of g * x_hat)
  float mean[kVec], slope[kVec], bias[kVec], weight[kVec], level[kVec], tilt[kVec];
  load_row(norm.mean, at.channel, 0.0f, mean);
  load_scale(norm.var, at.channel, norm.eps, slope);
  load_row(norm.weight, at.channel, 1.0f, weight);
  load_row(norm.bias, at.channel, 0.0f, bias);
  load_row(totals, at.channel, 0.0f, level);
  load_row(totals + size.channels, at.channel, 0.0f, tilt);
  const float rows = static_cast<float>(size.rows);
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) {
    level[j] = level[j] / rows;
    tilt[j] = tilt[j] / rows * slope[j];
    slope[j] *= weight[j];
  }
  const auto put = [&](const Pack<T, kVec>& gradient, const Pack<T, kVec>& value, const Pack<T, kVec>& result, int64_t place) {
    Pack<T, kVec> of_x, of_residual;
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) {
      const float deviation = widen(value.item[j]) - mean[j];
      float g = widen(gradient.item[j]);
      if (kAct) g = passed(g, out ? widen(result.item[j]) : deviation * slope[j] + bias[j], norm.cap);
      of_residual.item[j] = narrow<T>(g);
      of_x.item[j] = narrow<T>((g - level[j] - deviation * tilt[j]) * slope[j]);
    }
    if (grad_residual) *reinterpret_cast<Pack<T, kVec>*>(grad_residual + place) = of_residual;
    if (grad_x) *reinterpret_cast<Pack<T, kVec>*>(grad_x + place) = of_x;
  };
  const int64_t groups = size.groups;
  int64_t row = at.first;
  for (; row + (kRun - 1) * groups < at.last; row += kRun * groups) {
    Pack<T, kVec> gradients[kRun], values[kRun], results[kRun] = {};
    MWM_UNROLL
    for (int i = 0; i < kRun; ++i) {
      const int64_t place = (row + i * groups) * size.channels + at.channel;
      gradients[i] = load<T, kVec>(grad + place);
      values[i] = load<T, kVec>(x + place);
      if (kAct && out) results[i] = load<T, kVec>(out + place);
    }
    MWM_UNROLL
    for (int i = 0; i < kRun; ++i) put(gradients[i], values[i], results[i], (row + i * groups) * size.channels + at.channel);
  }
  for (; row < at.last; row += groups) {
    const int64_t place = row * size.channels + at.channel;
    put(load<T, kVec>(grad + place), load<T, kVec>(x + place), kAct && out ? load<T, kVec>(out + place) : Pack<T, kVec>{}, place);
  }
}

}  // namespace

void batch_norm_backward(const View& grad, const View& x, const View& out, const View& weight, const View& bias, const View& mean, const View& var, double eps,
                         int64_t activation, const View& sums, const View& totals, const View& grad_x, const View& grad_residual, int64_t device, int64_t stream) {
  const char* op = "batch_norm_backward";
  const Norm norm = norm_of(op, x, weight, bias, mean, var, eps, activation);
  check_tiles(op, grad, x.dtype);
  for (const View* map : {&grad, &out, &grad_x, &grad_residual}) check_map(op, *map, x);
  const int64_t channels = x.shape[1], shares = sums.shape[0];
  check_sums(op, sums, channels);
  check(op, totals, 2, DType::kFloat32);
  check_contiguous(op, totals);
  if (totals.shape[0] != 2 || totals.shape[1] != channels) fail("%s: totals must be [2, C]", op);
  const Place place(device, stream);
  with_kernel(op, x.dtype, wide({&grad, &x, &out, &grad_x, &grad_residual, &weight, &bias, &mean, &var, &totals}), activation != 0, [&](auto tag, auto vec, auto act) {
    using T = decltype(tag);
    constexpr int kVec = decltype(vec)::value;
    constexpr bool kAct = decltype(act)::value;
    const Rows size = rows_of(x, kVec);
    launch(op, place, shares, blocks_y(size, kVec), kThreads, backward_sums_kernel<T, kVec, kAct>, pointer<T>(grad), pointer<T>(x), pointer<T>(out), norm, size,
           pointer<double>(sums));
    launch(op, place, ceil_div<int64_t>(2 * channels, kJoinLanes), 1, kThreads, join_sums_kernel, pointer<double>(sums), norm.var, norm.eps, channels,
           static_cast<int32_t>(shares), pointer<float>(totals));
    if ((!is_none(grad_x) || !is_none(grad_residual)) && size.rows > 0)
      launch(op, place, blocks_x(size, kVec), blocks_y(size, kVec), kThreads, backward_kernel<T, kVec, kAct>, pointer<T>(grad), pointer<T>(x), pointer<T>(out), norm,
             pointer<float>(totals), size, pointer<T>(grad_x), pointer<T>(grad_residual));
  });
}

}  // namespace cuda
}  // namespace mwm
