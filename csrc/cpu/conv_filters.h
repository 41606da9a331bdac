// Filters packed into panels: [group][panel][tap][input][width], so that a panel's rows stream through registers in order.
#pragma once

#include "conv_window.h"
#include "lanes.h"

namespace mwm {
namespace MWM_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;
#else
constexpr bool kHasDot = false;
#endif

// Groups of few channels are joined into one block-diagonal group of at most kJoined, which fills the vectors better.
struct Groups {
  int64_t count, joined, inputs_each, outputs_each;

  Groups(int64_t groups, int64_t inputs, int64_t outputs) : count(groups), joined(1), inputs_each(inputs), outputs_each(outputs) {
    constexpr int64_t kJoined = 16;
    for (int64_t f = 2; f <= groups && f * most(inputs, outputs) <= kJoined; ++f)
      if (groups % f == 0) joined = f;
    count = groups / joined;
  }
  int64_t inputs() const { return inputs_each * joined; }
  int64_t outputs() const { return outputs_each * joined; }
};

// Sees weight [K, C / groups, kh, kw] as (group, input, output, tap); in the adjoint inputs are filters and outputs channels.
struct Filters {
  const View& weight;
  Groups groups;
  int64_t taps, kernel_w, group_step, input_step, output_step, depth;
  bool dot;
  static constexpr int64_t kAhead = 16, kBlock = 64, kWidest = 64;

  Filters(const View& w, const Window& window, bool adjoint, bool with_dot)
      : weight(w),
        groups(window.groups, adjoint ? w.shape[0] / window.groups : w.shape[1], adjoint ? w.shape[1] : w.shape[0] / window.groups),
        taps(window.taps()), kernel_w(window.kernel_w), group_step(w.shape[0] / window.groups * w.strides[0]),
        input_step(adjoint ? w.strides[0] : w.strides[1]), output_step(adjoint ? w.strides[1] : w.strides[0]),
        depth(groups.inputs()), dot(with_dot && depth % 2 == 0) {}

  template <class T> int64_t panels() const { return (groups.outputs() + kPanel<T> - 1) / kPanel<T>; }
  template <class T> int vectors(int64_t panel) const {
    return static_cast<int>((least<int64_t>(groups.outputs() - panel * kPanel<T>, kPanel<T>) + kLanes<T> - 1) / kLanes<T>);
  }
  template <class T> int64_t group_size() const { return taps * depth * round_up(groups.outputs(), kLanes<T>); }
  template <class T> int64_t offset(int64_t group, int64_t panel) const { return group * group_size<T>() + panel * kPanel<T> * taps * depth; }

  template <class W, class E, class P, class T>
  void pack_panel(int64_t group, int64_t panel, P* out) const {
    for (int64_t tap = 0; tap < taps; ++tap) pack_tap<W, E, P, T>(group, panel, tap, out + tap * depth * vectors<T>(panel) * kLanes<T>);
  }

  // One tap of a panel. W: type of the weight, E: type it is rounded to, P: type in the panel (T, or E where `dot` interleaves two inputs),
  // T: type of the sums.
  template <class W, class E, class P, class T>
  void pack_tap(int64_t group, int64_t panel, int64_t tap, P* out) const {
    const int64_t width = vectors<T>(panel) * kLanes<T>, first = panel * kPanel<T>;
    const int64_t lanes = least(groups.outputs() - first, width);
    const int64_t pair = dot ? 2 : 1;
    const W* at = static_cast<const W*>(weight.data) + group * groups.joined * group_step + tap / kernel_w * weight.strides[2] +
                  tap % kernel_w * weight.strides[3];
    for (int64_t begin = 0; begin < depth; begin += kBlock) {
      const int64_t end = least(begin + kBlock, depth);
      if (groups.joined > 1) pack_joined<E>(at, first, lanes, width, pair, begin, end, out);
      else if (output_step == 1 && pair == 1) pack_rows<E, 1>(at + first, lanes, width, begin, end, out);
      else if (output_step == 1) pack_rows<E, 2>(at + first, lanes, width, begin, end, out);
      else if (pair == 1) pack_columns<E, 1>(at + first * output_step, lanes, width, begin, end, out);
      else pack_columns<E, 2>(at + first * output_step, lanes, width, begin, end, out);
    }
  }

  // The weights of the next rows lie pages apart, where the machine does not look ahead by itself.
  template <class W>
  static void fetch(const W* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(W))) __builtin_prefetch(from + i);
  }

  // Outputs lie side by side in the weight.
  template <class E, int kPair, class P, class W>
  void pack_rows(const W* at, int64_t lanes, int64_t width, int64_t begin, int64_t end, P* to) const {
    E room[kPair][kWidest];
    for (int64_t p = begin; p < end; p += kPair) {
      P* row = to + p * width;
      for (int64_t ahead = kAhead; ahead < kAhead + kPair; ++ahead)
        if (p + ahead < depth) fetch(at + (p + ahead) * input_step, lanes);
      const E *first = in_type(at + p * input_step, lanes, room[0]), *second = in_type(at + (p + kPair - 1) * input_step, lanes, room[kPair - 1]);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        row[kPair * lane] = panel_value<P, E>(first[lane]);
        if (kPair == 2) row[kPair * lane + 1] = panel_value<P, E>(second[lane]);
      }
      for (int64_t i = kPair * lanes; i < kPair * width; ++i) row[i] = P{};
    }
  }

  // The same numbers in type E: in place, or rounded into `room`.
  template <class E, class W>
  static const E* in_type(const W* from, int64_t count, E* room) {
    if constexpr (__is_same(E, W)) {
      return from;
    } else {
      for (int64_t i = 0; i < count; i += kLanes<float>) {
        const MWM_ISA::Lanes<float> lanes(count - i);
        store_lanes(room + i, load_lanes(from + i, lanes), lanes);
      }
      return room;
    }
  }

  // Outputs lie apart: column by column of a block that stays in the first-level cache.
  template <class E, int kPair, class P, class W>
  void pack_columns(const W* at, int64_t lanes, int64_t width, int64_t begin, int64_t end, P* to) const {
    // Four bytes are a float, or the two inputs of a pair.
    if constexpr (kPair * sizeof(E) == 4 && kPair * sizeof(P) == 4) {
      constexpr int64_t kSquare = 4 * kPair;
      if (input_step == 1 && lanes == width && (end - begin) % kSquare == 0) {
        E room[4][kBlock];
        const E* from[4];
        for (int64_t lane = 0; lane < width; lane += 4) {
          for (int64_t ahead = lane + kAhead; ahead < least(lane + kAhead + 4, width); ++ahead) fetch(at + ahead * output_step + begin, end - begin);
          for (int i = 0; i < 4; ++i) from[i] = in_type(at + (lane + i) * output_step + begin, end - begin, room[i]);
          for (int64_t p = 0; p < end - begin; p += kSquare)
            transpose(from[0] + p, from[1] + p, from[2] + p, from[3] + p, to + (begin + p) * width + kPair * lane, kPair * width);
        }
        return;
      }
    }
    for (int64_t lane = 0; lane < width; ++lane) {
      const W* from = at + lane * output_step;
      P* column = to + begin * width + lane * kPair;
      const bool real = lane < lanes;
      for (int64_t p = begin; p < end; p += kPair, column += kPair * width) {
        column[0] = real ? panel_value<P, E>(from[p * input_step]) : P{};
        if (kPair == 2) column[1] = real ? panel_value<P, E>(from[(p + 1) * input_step]) : P{};
      }
    }
  }

  // Zero off the diagonal of joined groups.
  template <class E, class P, class W>
  void pack_joined(const W* at, int64_t first, int64_t lanes, int64_t width, int64_t pair, int64_t begin, int64_t end, P* to) const {
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t output = first + lane, group = output / groups.outputs_each;
      const W* from = at + group * group_step + output % groups.outputs_each * output_step;
      for (int64_t p = begin; p < end; ++p) {
        P value{};
        if (lane < lanes && group == p / groups.inputs_each) value = panel_value<P, E>(from[p % groups.inputs_each * input_step]);
        to[(p / pair * width + lane) * pair + p % pair] = value;
      }
    }
  }

  template <class P, class E, class W>
  static P panel_value(W x) {
    if constexpr (!__is_same(E, W)) return panel_value<P, E>(narrow<E>(x));
    else if constexpr (sizeof(P) == sizeof(E)) return bit_copy<P>(x);
    else return widen(x);
  }
};

}  // namespace MWM_ISA
}  // namespace mwm
