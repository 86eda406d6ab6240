// The largest logits of each row, and what share of the softmax they have.
#pragma once

#include "blockffn.h"
#include "kernels.h"
#include "parallel.h"
#include "workspace.h"

namespace blockffn {

struct Candidate {
  float value;
  int64_t output;
};

// Keeps the `most` largest, best first; of equal ones the earlier.
inline void insert(Candidate* best, int64_t& count, int64_t most, Candidate candidate) {
  if (count == most && !(candidate.value > best[count - 1].value)) return;
  int64_t place = count < most ? count++ : count - 1;
  for (; place > 0 && candidate.value > best[place - 1].value; --place) best[place] = best[place - 1];
  best[place] = candidate;
}

// The `most` largest of values[begin .. end), `begin` a multiple of a strip, into `best`; returns how many there are.
inline int64_t best_of(const float* values, int64_t begin, int64_t end, int64_t most, Candidate* best) {
  int64_t count = 0;
  for (int64_t first = begin; first < end; first += kStrip) {
    const int64_t last = first + kStrip < end ? first + kStrip : end;
    // Most strips hold none of the best; a comparison that NaN fails says so without branches.
    if (count == most) {
      const float bar = best[count - 1].value;
      int any = 0;
      for (int64_t i = first; i < last; ++i) any |= values[i] > bar;
      if (!any) continue;
    }
    for (int64_t i = first; i < last; ++i) insert(best, count, most, {values[i], i});
  }
  return count;
}

// The first largest logit of each row, which stays as it is. Threads share pieces of rows.
class Choosing {
 public:
  explicit Choosing(const blockffn_step& step) : step_(step) {}

  void reserve(Workspace& memory, int64_t outputs) {
    outputs_ = outputs;
    pieces_ = (outputs + kPiece - 1) / kPiece;
    at_best_ = memory.reserve(step_.num_logits * pieces_ * static_cast<int64_t>(sizeof(Candidate)));
  }
  void use(const Workspace& memory) { best_ = memory.at<Candidate>(at_best_); }

  // By all threads, when the logits are there.
  void choose_in_pieces() {
    for (int64_t i; (i = tasks_.take()) < step_.num_logits * pieces_;) {
      const int64_t begin = i % pieces_ * kPiece, end = begin + kPiece < outputs_ ? begin + kPiece : outputs_;
      best_of(step_.logits + i / pieces_ * round_up(outputs_, kStrip), begin, end, 1, best_ + i);
    }
  }

  // By one thread, when the pieces are done.
  void merge() const {
    for (int64_t row = 0; row < step_.num_logits; ++row) {
      Candidate best;
      int64_t count = 0;
      for (int64_t i = row * pieces_; i < (row + 1) * pieces_; ++i) insert(&best, count, 1, best_[i]);
      step_.choices[row] = best.output;
    }
  }

 private:
  static constexpr int64_t kPiece = 8192;

  const blockffn_step& step_;
  int64_t outputs_ = 0, pieces_ = 0;
  int64_t at_best_ = 0;
  Candidate* best_ = nullptr;  // [logits][pieces]
  Counter tasks_;
};

// A row is ranked in pieces of a fixed length, which threads share; so sums do not depend on their number or timing.
class Ranking {
 public:
  Ranking(const Kernels& isa, const blockffn_step& step) : isa_(isa), step_(step) {}

  void reserve(Workspace& memory, int64_t outputs) {
    outputs_ = outputs;
    stride_ = round_up(outputs, kStrip);
    pieces_ = (outputs + kPiece - 1) / kPiece;
    const int64_t count = step_.num_logits * pieces_;
    at_summaries_ = memory.reserve(count * static_cast<int64_t>(sizeof(Summary)));
    at_best_ = memory.reserve(count * step_.num_best * static_cast<int64_t>(sizeof(Candidate)));
  }
  void use(const Workspace& memory) {
    summaries_ = memory.at<Summary>(at_summaries_);
    best_ = memory.at<Candidate>(at_best_);
  }

  // By all threads, when the logits are there.
  void rank_pieces() {
    for (int64_t i; (i = tasks_.take()) < step_.num_logits * pieces_;) rank_piece(i / pieces_, i % pieces_);
  }

  // By one thread, when the pieces are ranked.
  void merge() const {
    for (int64_t row = 0; row < step_.num_logits; ++row) merge_row(row);
  }

 private:
  static constexpr int64_t kPiece = 4096;

  struct Summary {
    float largest;
    float sum;  // of exp(value - largest)
    int64_t count;
  };

  void rank_piece(int64_t row, int64_t piece) const {
    const int64_t begin = piece * kPiece, end = begin + kPiece < outputs_ ? begin + kPiece : outputs_;
    float* values = step_.logits + row * stride_;
    Summary& summary = summaries_[row * pieces_ + piece];
    Candidate* best = best_ + (row * pieces_ + piece) * step_.num_best;
    summary.count = best_of(values, begin, end, step_.num_best, best);
    summary.largest = best[0].value;
    summary.sum = isa_.exponentials(values + begin, end - begin);
  }

  void merge_row(int64_t row) const {
    const Summary* summaries = summaries_ + row * pieces_;
    Candidate merged[BLOCKFFN_MAX_BEST];
    int64_t count = 0;
    for (int64_t piece = 0; piece < pieces_; ++piece) {
      const Candidate* best = best_ + (row * pieces_ + piece) * step_.num_best;
      for (int64_t i = 0; i < summaries[piece].count; ++i) insert(merged, count, step_.num_best, best[i]);
    }
    double sum = 0;
    for (int64_t piece = 0; piece < pieces_; ++piece)
      sum += summaries[piece].sum * __builtin_exp(summaries[piece].largest - merged[0].value);
    const float log_sum = merged[0].value + static_cast<float>(__builtin_log(sum));
    for (int64_t i = 0; i < step_.num_best; ++i) {
      const float log_prob = merged[i].value - log_sum;
      step_.best[row * step_.num_best + i] = merged[i].output;
      step_.best_log_probs[row * step_.num_best + i] = log_prob == log_prob ? log_prob : -__builtin_inff();
    }
  }

  const Kernels& isa_;
  const blockffn_step& step_;
  int64_t outputs_ = 0, stride_ = 0, pieces_ = 0;
  int64_t at_summaries_ = 0, at_best_ = 0;
  Summary* summaries_ = nullptr;  // [logits][pieces]
  Candidate* best_ = nullptr;     // [logits][pieces][num_best]
  Counter tasks_;
};

}  // namespace blockffn
