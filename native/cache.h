// The cache of keys and values.
//
// To the kernels the cache is a set of packed matrices (blockffn.h): the keys of a head, whose outputs are positions, and
// its values, whose inputs are positions. Scores and means over values are then the products that everything else is made
// of. Latent attention has one such head for all: keys are the latent and the rotary key, values the latent.
#pragma once

#include <string.h>

#include "blockffn.h"
#include "strips.h"

namespace blockffn {

class Cache {
 public:
  explicit Cache(const blockffn_model& model)
      : base_(static_cast<uint8_t*>(model.cache)),
        heads_(model.num_key_heads),
        capacity_(round_up(model.capacity, kStrip)),
        key_count_(key_width(model)),
        keys_(model.cache_format, capacity_, key_count_, 0),
        values_(model.cache_format, value_width(model), capacity_, 0) {}

  static int64_t key_width(const blockffn_model& model) {
    return model.attention == BLOCKFFN_LATENT ? model.latent_size + model.rope_width : model.rope_width;
  }
  static int64_t value_width(const blockffn_model& model) {
    return model.attention == BLOCKFFN_LATENT ? model.latent_size : model.value_width;
  }

  // Positions whose keys lie in the same cache lines: aligned blocks, each of which one thread writes.
  static constexpr int64_t kBlock = 16;
  static int64_t num_blocks(int64_t position, int64_t count) { return (position + count - 1) / kBlock - position / kBlock + 1; }
  static int64_t begin_of_block(int64_t position, int64_t block) { return (position / kBlock + block) * kBlock; }

  int format() const { return keys_.format; }
  int64_t layer_bytes() const { return heads_ * (keys_.total_bytes() + values_.total_bytes()); }
  // Keys as a matrix of `positions` outputs; values as one of `positions` inputs, whose strips lie value_strip_bytes apart.
  Strips keys(int64_t positions) const { return Strips(keys_.format, positions, keys_.inputs, 0); }
  int64_t key_inputs() const { return keys_.inputs; }
  int64_t num_value_strips() const { return values_.count(); }
  int64_t value_strip_bytes() const { return values_.bytes; }
  uint8_t* keys_at(int64_t layer, int64_t head) const {
    return base_ + layer * layer_bytes() + head * (keys_.total_bytes() + values_.total_bytes());
  }
  uint8_t* values_at(int64_t layer, int64_t head) const { return keys_at(layer, head) + keys_.total_bytes(); }

  void write(int64_t layer, int64_t head, int64_t position, const float* key, const float* value) const {
    uint8_t* strip = keys_at(layer, head) + position / kStrip * keys_.bytes;
    for (int64_t k = 0; k < key_count_; ++k) store(strip, k, position % kStrip, key[k]);
    for (int64_t first = 0; first < values_.outputs; first += kStrip) {
      uint8_t* values = values_at(layer, head) + first / kStrip * values_.bytes;
      const int64_t count = values_.outputs - first < kStrip ? values_.outputs - first : kStrip;
      for (int64_t lane = 0; lane < count; ++lane) store(values, position, lane, value[first + lane]);
    }
  }

  void move(int64_t layer, int64_t head, int64_t from, int64_t to) const {
    uint8_t* keys = keys_at(layer, head);
    uint8_t* values = values_at(layer, head);
    for (int64_t k = 0; k < keys_.inputs; ++k)
      copy(keys + to / kStrip * keys_.bytes, k, to % kStrip, keys + from / kStrip * keys_.bytes, k, from % kStrip);
    for (int64_t strip = 0; strip < values_.count(); ++strip)
      for (int64_t lane = 0; lane < kStrip; ++lane)
        copy(values + strip * values_.bytes, to, lane, values + strip * values_.bytes, from, lane);
  }

 private:
  // Where input `k` of output `lane` lies in a strip, in elements.
  int64_t index(int64_t k, int64_t lane) const {
    return keys_.format == kF32 ? k * kStrip + lane : (k / 2 * kStrip + lane) * 2 + k % 2;
  }
  void store(uint8_t* strip, int64_t k, int64_t lane, float value) const {
    if (keys_.format == kF32)
      reinterpret_cast<float*>(strip)[index(k, lane)] = value;
    else
      reinterpret_cast<uint16_t*>(strip)[index(k, lane)] = float_to_bf16(value);
  }
  void copy(uint8_t* to, int64_t to_k, int64_t to_lane, const uint8_t* from, int64_t k, int64_t lane) const {
    const int64_t bytes = keys_.format == kF32 ? 4 : 2;
    memcpy(to + index(to_k, to_lane) * bytes, from + index(k, lane) * bytes, static_cast<size_t>(bytes));
  }

  uint8_t* base_;
  int64_t heads_;
  int64_t capacity_;
  int64_t key_count_;
  Strips keys_;
  Strips values_;
};

}  // namespace blockffn
