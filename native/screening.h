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
    at_best_ = memory.reserve(rows * pieces() * step_.num_exact * static_cast<int64_t>(sizeof(Candidate)));
    at_counts_ = memory.reserve(rows * pieces() * 8);
    at_chosen_ = memory.reserve(rows ? head_.count() * 8 : 0);
    at_is_chosen_ = memory.reserve(rows ? head_.count() : 0);
  }
  void use(const Workspace& memory) {
    bars_ = memory.at<Bar>(at_bars_);
    best_ = memory.at<Candidate>(at_best_);
    counts_ = memory.at<int64_t>(at_counts_);
    chosen_ = memory.at<int64_t>(at_chosen_);
    is_chosen_ = memory.at<uint8_t>(at_is_chosen_);
  }

  // How far a row's coarse logits may be off: of x as it is and as it was prepared for the head and for the screen.
  void measure(int64_t row, const float* x, int64_t count, const uint8_t* for_head, const uint8_t* for_screen) const {
    double own = 0, coarse = 0, apart = 0, apart_rounded = 0;
    for (int64_t k = 0; k < count; ++k) {
      const double y = activation(screen_, for_screen, k);
      double exact = x[k];
      if (head_.format == kInt8 || head_.format == kInt4) exact = activation(head_, for_head, k);
      own += exact * exact;
      coarse += y * y;
      apart += (exact - y) * (exact - y);
      if (head_.format != kBf16) continue;
      // Some processors round activations to bf16 beside weights in bf16, others do not.
      const double rounded = bf16_to_float(float_to_bf16(x[k]));
      apart_rounded += (rounded - y) * (rounded - y);
    }
    const double difference = __builtin_sqrt(apart_rounded > apart ? apart_rounded : apart);
    const double norm = __builtin_sqrt(coarse), rounding = static_cast<double>(head_.inputs + 64) / (1 << 24);
    const double slack = 1 + 1e-5;  // for this bound's own rounding
    bars_[row].by_error = static_cast<float>(norm * (1 + rounding) * slack);
    bars_[row].by_norm = static_cast<float>((difference + rounding * (1.01 * __builtin_sqrt(own) + norm)) * slack);
  }

  // By all threads, when the coarse logits are there.
  void rank_pieces() {
    for (int64_t i; (i = ranked_.take()) < step_.num_logits * pieces();) {
      const int64_t begin = i % pieces() * kPiece, end = begin + kPiece;
      counts_[i] = best_of(logits(i / pieces()), begin, end < head_.outputs ? end : head_.outputs, step_.num_exact,
                           best_ + i * step_.num_exact);
    }
  }

  // By one thread, when pieces are ranked: which strips to read first.
  void choose() {
    __builtin_memset(is_chosen_, 0, static_cast<size_t>(head_.count()));
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      Candidate best[BLOCKFFN_MAX_BEST];
      int64_t count = 0;
      for (int64_t i = row * pieces(); i < (row + 1) * pieces(); ++i)
        for (int64_t n = 0; n < counts_[i]; ++n) insert(best, count, step_.num_exact, best_[i * step_.num_exact + n]);
      for (int64_t n = 0; n < count; ++n) {
        const int64_t strip = best[n].output / kStrip;
        if (!is_chosen_[strip]) chosen_[num_chosen_++] = strip;
        is_chosen_[strip] = 1;
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

  // By all threads: reads the strips that may hold more, and empties the others.
  template <typename Row>
  void read_rest(Row row) {
    int64_t wanted[kStrips + 1];
    for (int64_t first; (first = finished_.take() * kStrips) < head_.count();) {
      int64_t count = 0;
      for (int64_t strip = first; strip < first + kStrips && strip < head_.count(); ++strip) {
        if (is_chosen_[strip]) continue;
        if (may_reach(strip))
          wanted[count++] = strip;
        else
          empty(strip);
      }
      for (int64_t i = 0; i < count; ++i) read(wanted[i], i + 1 < count ? at(wanted[i + 1]) : nullptr, row);
      __atomic_fetch_add(&num_read_, count, __ATOMIC_RELAXED);
    }
  }

  int64_t num_read() const { return num_read_; }

 private:
  static constexpr int64_t kPiece = 4096;  // outputs
  static constexpr int64_t kStrips = 32;

  struct Bar {
    float by_error, by_norm;  // factors of a row's two norms
    float value;
  };

  int64_t pieces() const { return (head_.outputs + kPiece - 1) / kPiece; }
  float* logits(int64_t row) const { return step_.logits + row * head_.padded_outputs(); }
  const uint8_t* at(int64_t strip) const { return data_ + strip * head_.bytes; }

  static double activation(const Strips& strips, const uint8_t* row, int64_t k) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(row);
    return static_cast<double>(codes[k]) * reinterpret_cast<const float*>(codes + strips.inputs)[k / strips.group];
  }

  bool may_reach(int64_t strip) const {
    const float* errors = errors_ + strip * 2 * kStrip;
    const int64_t left = head_.outputs - strip * kStrip, lanes = left < kStrip ? left : kStrip;
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      const Bar bar = bars_[row];
      const float* coarse = logits(row) + strip * kStrip;
      int any = 0;  // NaN may be anything
      for (int64_t i = 0; i < lanes; ++i)
        any |= !(coarse[i] + (errors[i] * bar.by_error + errors[kStrip + i] * bar.by_norm) < bar.value);
      if (any) return true;
    }
    return false;
  }

  void empty(int64_t strip) const {
    for (int64_t row = 0; row < step_.num_logits; ++row)
      for (int64_t i = 0; i < kStrip; ++i) logits(row)[strip * kStrip + i] = -__builtin_inff();
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
  int64_t at_bars_ = 0, at_best_ = 0, at_counts_ = 0, at_chosen_ = 0, at_is_chosen_ = 0;
  Bar* bars_ = nullptr;           // [logits]
  Candidate* best_ = nullptr;     // [logits][pieces][num_exact]
  int64_t* counts_ = nullptr;     // [logits][pieces]
  int64_t* chosen_ = nullptr;     // strips that set the bars
  uint8_t* is_chosen_ = nullptr;  // [strips]
  int64_t num_chosen_ = 0, num_read_ = 0;
  Counter ranked_, taken_, finished_;
};

}  // namespace blockffn
