// Batch norm in training, forward: the moments in two stages (a share's, then all), and the norm with a residual and a ReLU in one pass.
//
// A thread sums its rows in float32, a block its groups and the last kernel the shares in float64, each in fixed order. Deviations are
// summed from each thread's first value, so a mean far from zero costs no digits of the variance.
#include "batch_norm.h"

namespace mwm {
namespace cuda {
namespace {

constexpr int kMomentsRun = 4, kJoinLanes = 8, kJoinGroups = kThreads / kJoinLanes;

template <class T, int kVec>
__global__ void __launch_bounds__(kThreads) moments_kernel(const T* x, Rows size, double* sums) {
  __shared__ double means[kThreads * kVec], spreads[kThreads * kVec];
  const At at(size, kVec);
  const int64_t groups = size.groups, step = groups * size.channels;
  float start[kVec] = {}, total[kVec] = {}, squares[kVec] = {};
  const auto add = [&](const Pack<T, kVec>& pack) {
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) {
      const float deviation = widen(pack.item[j]) - start[j];
      total[j] += deviation;
      squares[j] += deviation * deviation;
    }
  };
  if (at.some && at.first < at.last) {
    int64_t row = at.first;
    const T* from = x + row * size.channels + at.channel;
    const Pack<T, kVec> head = load<T, kVec>(from);
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) start[j] = widen(head.item[j]);
    for (; row + (kMomentsRun - 1) * groups < at.last; row += kMomentsRun * groups, from += kMomentsRun * step) {
      Pack<T, kVec> packs[kMomentsRun];
      MWM_UNROLL
      for (int i = 0; i < kMomentsRun; ++i) packs[i] = load<T, kVec>(from + i * step);
      MWM_UNROLL
      for (int i = 0; i < kMomentsRun; ++i) add(packs[i]);
    }
    for (; row < at.last; row += groups, from += step) add(load<T, kVec>(from));
  }
  // How many rows a group has follows from its number.
  const int64_t begin = at.first - at.group, all = at.last - begin, whole = all / groups, rest = all % groups, count = whole + (at.group < rest);
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) {
    const double mean = count ? static_cast<double>(total[j]) / static_cast<double>(count) : 0.0;
    means[threadIdx.x * kVec + j] = static_cast<double>(start[j]) + mean;
    spreads[threadIdx.x * kVec + j] = static_cast<double>(squares[j]) - static_cast<double>(total[j]) * mean;
  }
  __syncthreads();
  // A thread per channel joins the groups; deviations are from the first group's mean.
  const int width = size.lanes * kVec;
  for (int own = static_cast<int>(threadIdx.x); own < width; own += kThreads) {
    const int64_t channel = static_cast<int64_t>(blockIdx.y) * width + own;
    if (channel >= size.channels) continue;
    const double base = means[own];
    double offset = 0, spread = 0;
    for (int group = 0; group < size.groups; ++group) {
      const double off = means[group * width + own] - base, weight = static_cast<double>(whole + (group < rest));
      offset += off * weight;
      spread += spreads[group * width + own] + off * off * weight;
    }
    const double rows = static_cast<double>(most<int64_t>(all, 1));
    sums[(static_cast<int64_t>(blockIdx.x) * 2) * size.channels + channel] = base + offset / rows;
    sums[(static_cast<int64_t>(blockIdx.x) * 2 + 1) * size.channels + channel] = spread - offset * offset / rows;
  }
}

// Mean and variance of all rows from those of the shares.
__global__ void __launch_bounds__(kThreads) join_moments_kernel(const double* sums, Rows size, int32_t shares, float* mean, float* var, float* running_mean,
                                                                float* running_var, float momentum) {
  __shared__ double offsets[kJoinGroups][kJoinLanes], spreads[kJoinGroups][kJoinLanes];
  const int lane = static_cast<int>(threadIdx.x) % kJoinLanes, group = static_cast<int>(threadIdx.x) / kJoinLanes;
  const int64_t channels = size.channels, channel = static_cast<int64_t>(blockIdx.x) * kJoinLanes + lane;
  const double base = channel < channels ? sums[channel] : 0.0;
  double offset = 0, spread = 0;
  if (channel < channels) {
    MWM_UNROLL_BY(4)
    for (int64_t share = group; share < shares; share += kJoinGroups) {
      const double weight = static_cast<double>(size.begin(share + 1) - size.begin(share));
      const double off = sums[share * 2 * channels + channel] - base;
      offset += off * weight;
      spread += sums[(share * 2 + 1) * channels + channel] + off * off * weight;
    }
  }
  offsets[group][lane] = offset, spreads[group][lane] = spread;
  __syncthreads();
  if (group != 0 || channel >= channels) return;
  for (int other = 1; other < kJoinGroups; ++other) offset += offsets[other][lane], spread += spreads[other][lane];
  const double all = static_cast<double>(size.rows), middle = base + offset / all;
  spread -= offset * offset / all;
  spread = spread < 0 ? 0.0 : spread;
  mean[channel] = static_cast<float>(middle);
  var[channel] = static_cast<float>(spread / all);
  if (running_mean == nullptr) return;
  running_mean[channel] += momentum * (static_cast<float>(middle) - running_mean[channel]);
  running_var[channel] += momentum * (static_cast<float>(spread / (all - 1)) - running_var[channel]);
}

template <class T, int kVec, bool kAct>
__global__ void __launch_bounds__(kThreads) apply_kernel(const T* x, const T* residual, Norm norm, Rows size, T* out) {
  const At at(size, kVec);
  if (!at.some) return;
  const int64_t groups = size.groups;
  int64_t row = at.first;
  Pack<T, kVec> values[kRun], others[kRun] = {};
  const auto place = [&](int i) { return (row + i * groups) * size.channels + at.channel; };
  const auto fetch = [&] {
    if (row + (kRun - 1) * groups >= at.last) return false;
    MWM_UNROLL
    for (int i = 0; i < kRun; ++i) {
      values[i] = load<T, kVec>(x + place(i));
      if (residual) others[i] = load<T, kVec>(residual + place(i));
    }
    return true;
  };
  bool full = fetch();  // on its way while the parameters come
  float mean[kVec], slope[kVec], bias[kVec], weight[kVec];
  load_row(norm.mean, at.channel, 0.0f, mean);
  load_row(norm.weight, at.channel, 1.0f, weight);
  load_row(norm.bias, at.channel, 0.0f, bias);
  load_scale(norm.var, at.channel, norm.eps, slope);
  MWM_UNROLL
  for (int j = 0; j < kVec; ++j) slope[j] *= weight[j];
  const auto put = [&](const Pack<T, kVec>& value, const Pack<T, kVec>& other, int64_t to) {
    Pack<T, kVec> result;
    MWM_UNROLL
    for (int j = 0; j < kVec; ++j) {
      float y = (widen(value.item[j]) - mean[j]) * slope[j] + bias[j];
      if (residual) y += widen(other.item[j]);
      result.item[j] = narrow<T>(kAct ? rectified(y, norm.cap) : y);
    }
    *reinterpret_cast<Pack<T, kVec>*>(out + to) = result;
  };
  while (full) {
    MWM_UNROLL
    for (int i = 0; i < kRun; ++i) put(values[i], others[i], place(i));
    row += kRun * groups;
    full = fetch();
  }
  for (; row < at.last; row += groups) put(load<T, kVec>(x + place(0)), residual ? load<T, kVec>(residual + place(0)) : Pack<T, kVec>{}, place(0));
}

}  // namespace

void batch_norm_moments(const View& x, const View& sums, const View& mean, const View& var, const View& running_mean, const View& running_var, double momentum,
                        int64_t device, int64_t stream) {
  const char* op = "batch_moments";
  check_tiles(op, x, x.dtype);
  const int64_t channels = x.shape[1];
  check_sums(op, sums, channels);
  for (const View* row : {&mean, &var}) check_row(op, *row, channels, false);
  for (const View* row : {&running_mean, &running_var}) check_row(op, *row, channels, true);
  if (is_none(running_mean) != is_none(running_var)) fail("%s: both running moments or none", op);
  if (x.shape[0] * x.shape[2] * x.shape[3] < 2) fail("%s: x must have two positions or more", op);
  const Place place(device, stream);
  const int64_t shares = sums.shape[0];
  with_kernel(op, x.dtype, wide({&x}), false, [&](auto tag, auto vec, auto) {
    using T = decltype(tag);
    constexpr int kVec = decltype(vec)::value;
    const Rows size = rows_of(x, kVec, kMomentsRun, shares);
    launch(op, place, shares, blocks_y(size, kVec), kThreads, moments_kernel<T, kVec>, pointer<T>(x), size, pointer<double>(sums));
    launch(op, place, ceil_div<int64_t>(channels, kJoinLanes), 1, kThreads, join_moments_kernel, pointer<double>(sums), size, static_cast<int32_t>(shares),
           pointer<float>(mean), pointer<float>(var), pointer<float>(running_mean), pointer<float>(running_var), static_cast<float>(momentum));
  });
}

void batch_norm_apply(const View& x, const View& residual, const View& weight, const View& bias, const View& mean, const View& var, double eps, int64_t activation,
                      const View& out, int64_t device, int64_t stream) {
  const char* op = "batch_norm";
  const Norm norm = norm_of(op, x, weight, bias, mean, var, eps, activation);
  check_map(op, residual, x);
  check_tiles(op, out, x.dtype);
  check_map(op, out, x);
  if (element_count(op, x) == 0) return;
  const Place place(device, stream);
  with_kernel(op, x.dtype, wide({&x, &residual, &out, &weight, &bias, &mean, &var}), activation != 0, [&](auto tag, auto vec, auto act) {
    using T = decltype(tag);
    constexpr int kVec = decltype(vec)::value;
    const Rows size = written_rows_of(x, kVec);
    launch(op, place, blocks_x(size), blocks_y(size, kVec), kThreads, apply_kernel<T, kVec, decltype(act)::value>, pointer<T>(x), pointer<T>(residual), norm, size,
           pointer<T>(out));
  });
}

}  // namespace cuda
}  // namespace mwm
