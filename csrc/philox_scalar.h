// Philox4x32-10 one counter at a time, as a thread of a GPU computes it, and the numbers that all of our Philox code shares.
#pragma once

#include <cstdint>

#include "device_code.h"

namespace mwm {
namespace {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

// Streams of the ops; the numbers are those of python/mwm/ops/constants.py.
constexpr uint32_t kStreamKey = 0, kStreamRounding = 1, kStreamWeight = 2;

// words[0 ... 4) of the counter (c0, c1, c2, c3).
MWM_DEVICE inline void philox_scalar(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t key, uint32_t* words) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(c0) * kPhiloxMultiplier0, second = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace
}  // namespace mwm
