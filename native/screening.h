// The largest logits exactly, without reading all of the head. A coarse copy of it is read first; then, of the head itself,
// the strips where the coarse logits are largest, which sets the bar; then the strips with an output that may reach it.
//
// With w a row of the head and s of its screen, x and y the same activations as either product takes them:
//     |w x - s y| = |(w - s) y + w (x - y)| <= |w - s| |y| + |w| |x - y|,
// and what rounding does to either sum is below (inputs + 64) * 2^-24 times the norms of its factors.
#pragma once

#include "blockffn.h"
#include "kernels.h"
#include "parallel.h"
#include "ranking.h"
#include "strips.h"
#include "workspace.h"

namespace blockffn {

class Screening {
 public:
  Screening(const Kernels& isa, const blockffn_model& model, const blockffn_step& step)
      : isa_(isa), step_(step), head_(model.head), screen_(model.screen), data_(model.head.data), errors_(model.screen_errors) {}

  void reserve(Workspace& memory) {
    const int64_t rows = step_.num_exact ? step_.num_logits : 0;
    at_bars_ = memory.reserve(rows * static_cast<int64_t>(sizeof(Bar)));
    at_largest_ = memory.reserve(rows * head_.count() * 4);
    at_limits_ = memory.reserve(rows * head_.count() * 4);
    at_chosen_ = memory.reserve(rows ? head_.count() * 8 : 0);
    at_is_read_ = memory.reserve(rows ? head_.count() : 0);
  }
  void use(const Workspace& memory) {
    bars_ = memory.at<Bar>(at_bars_);
    largest_ = memory.at<float>(at_largest_);
    limits_ = memory.at<float>(at_limits_);
    chosen_ = memory.at<int64_t>(at_chosen_);
    is_read_ = memory.at<uint8_t>(at_is_read_);
  }

  // How far a row's coarse logits may be off: of x as it is and as it was prepared for the head and for the screen.
  void measure(int64_t row, const float* x, int64_t count, const uint8_t* for_head, const uint8_t* for_screen) const {
    const bool is_coded = head_.format == kInt8 || head_.format == kInt4;
    double own = 0, coarse = 0, apart = 0, apart_rounded = 0;
    for (int64_t first = 0; first < count; first += kGroup) {
      const Codes y(screen_, for_screen, first), codes(is_coded ? head_ : screen_, is_coded ? for_head : for_screen, first);
      for (int64_t k = first; k < first + kGroup && k < count; ++k) {
        const double exact = is_coded ? codes.at(k) : x[k];
        own += exact * exact;
        coarse += y.at(k) * y.at(k);
        apart += (exact - y.at(k)) * (exact - y.at(k));
        if (head_.format != kBf16) continue;
        // Some processors round activations to bf16 beside weights in bf16, others do not.
        const double rounded = bf16_to_float(float_to_bf16(x[k]));
        apart_rounded += (rounded - y.at(k)) * (rounded - y.at(k));
      }
    }
    const double difference = __builtin_sqrt(apart_rounded > apart ? apart_rounded : apart);
    const double norm = __builtin_sqrt(coarse), rounding = static_cast<double>(head_.inputs + 64) / (1 << 24);
    const double slack = 1 + 1e-5;  // for this bound's own rounding
    bars_[row].by_error = static_cast<float>(norm * (1 + rounding) * slack);
    bars_[row].by_norm = static_cast<float>((difference + rounding * (1.01 * __builtin_sqrt(own) + norm)) * slack);
  }

  // By any thread, for the coarse logits begin .. end - 1 of whole strips while they are in its cache: keeps what choosing
  // needs of them and empties them.
  void bound(int64_t begin, int64_t end) const {
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      const Bar bar = bars_[row];
      float* coarse = logits(row);
      for (int64_t o = end; o % kStrip; ++o) coarse[o] = -__builtin_inff();
      for (int64_t first = begin; first < end; first += kStrip) {
        const int64_t strip = first / kStrip, at = row * head_.count() + strip;
        isa_.bound(coarse + first, errors_ + strip * 2 * kStrip, bar.by_error, bar.by_norm, largest_ + at, limits_ + at);
        for (int64_t o = first; o < first + kStrip; ++o) coarse[o] = -__builtin_inff();
      }
    }
  }

  // By one thread, when all coarse logits are bounded: which strips to read first.
  void choose() {
    __builtin_memset(is_read_, 0, static_cast<size_t>(head_.count()));
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      Candidate best[BLOCKFFN_MAX_BEST];
      const int64_t count = best_of(largest_ + row * head_.count(), 0, head_.count(), step_.num_exact, best);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t strip = best[n].output;
        if (!is_read_[strip]) chosen_[num_chosen_++] = strip;
        is_read_[strip] = 1;
      }
    }
    num_read_ = num_chosen_;
  }

  // By all threads: row(i) is row i, prepared for the head.
  template <typename Row>
  void read_chosen(Row row) {
    for (int64_t i; (i = taken_.take()) < num_chosen_;) read(chosen_[i], nullptr, row);
  }

  // By one thread, when they are read: the bar that an output must reach, a true logit with enough above it.
  void set_bars() const {
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      Candidate best[BLOCKFFN_MAX_BEST];
      int64_t count = 0;
      for (int64_t i = 0; i < num_chosen_; ++i)
        for (int64_t o = chosen_[i] * kStrip; o < (chosen_[i] + 1) * kStrip && o < head_.outputs; ++o)
          insert(best, count, step_.num_exact, {logits(row)[o], o});
      // A little lower: scores that are divided by a temperature may become equal.
      const float least = best[count - 1].value;
      bars_[row].value = least - __builtin_fabsf(least) * (1.0f / (1 << 21));
    }
  }

  // By all threads: reads the strips that may hold more.
  template <typename Row>
  void read_rest(Row row) {
    int64_t wanted[kStrips + 1];
    for (int64_t first; (first = finished_.take() * kStrips) < head_.count();) {
      int64_t count = 0;
      for (int64_t strip = first; strip < first + kStrips && strip < head_.count(); ++strip) {
        if (is_read_[strip] || !may_reach(strip)) continue;
        wanted[count++] = strip;
        is_read_[strip] = 1;
      }
      for (int64_t i = 0; i < count; ++i) read(wanted[i], i + 1 < count ? at(wanted[i + 1]) : nullptr, row);
      __atomic_fetch_add(&num_read_, count, __ATOMIC_RELAXED);
    }
  }

  // By one thread, when all is read: the first largest logit of each row.
  void choose_outputs() const {
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      Candidate best;
      int64_t count = 0;
      for (int64_t strip = 0; strip < head_.count(); ++strip) {
        if (!is_read_[strip]) continue;
        for (int64_t o = strip * kStrip; o < (strip + 1) * kStrip && o < head_.outputs; ++o)
          insert(&best, count, 1, {logits(row)[o], o});
      }
      step_.choices[row] = best.output;
    }
  }

  int64_t num_read() const { return num_read_; }

 private:
  static constexpr int64_t kStrips = 32;
  static constexpr int64_t kGroup = 32;  // inputs that share a scale whatever the group

  struct Bar {
    float by_error, by_norm;  // factors of a row's two norms
    float value;
  };

  float* logits(int64_t row) const { return step_.logits + row * head_.padded_outputs(); }
  const uint8_t* at(int64_t strip) const { return data_ + strip * head_.bytes; }

  // Of a prepared row, the values from input `first` on that share a scale.
  struct Codes {
    const int8_t* codes;
    double scale;

    Codes(const Strips& strips, const uint8_t* row, int64_t first)
        : codes(reinterpret_cast<const int8_t*>(row)),
          scale(reinterpret_cast<const float*>(codes + strips.inputs)[first / strips.group]) {}
    double at(int64_t k) const { return codes[k] * scale; }
  };

  bool may_reach(int64_t strip) const {
    for (int64_t row = 0; row < step_.num_logits; ++row)
      if (!(limits_[row * head_.count() + strip] < bars_[row].value)) return true;  // NaN may be anything
    return false;
  }

  template <typename Row>
  void read(int64_t strip, const uint8_t* next, Row row) const {
    multiply_strips(isa_, head_, at(strip), 1, step_.num_logits, false, Reading::from_to(at(strip + 1), next), row,
                    [&](int64_t i) { return logits(i) + strip * kStrip; });
  }

  const Kernels& isa_;
  const blockffn_step& step_;
  const Strips head_, screen_;
  const uint8_t* const data_;
  const float* const errors_;
  int64_t at_bars_ = 0, at_largest_ = 0, at_limits_ = 0, at_chosen_ = 0, at_is_read_ = 0;
  Bar* bars_ = nullptr;         // [logits]
  float* largest_ = nullptr;    // [logits][strips] of the coarse logits
  float* limits_ = nullptr;     // [logits][strips] which no true logit exceeds
  int64_t* chosen_ = nullptr;   // strips that set the bars
  uint8_t* is_read_ = nullptr;  // [strips]
  int64_t num_chosen_ = 0, num_read_ = 0;
  Counter taken_, finished_;
};

}  // namespace blockffn
