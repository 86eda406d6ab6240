// Attention of a step's tokens over the cache, for any threads that share its tasks.
#pragma once

#include "cache.h"
#include "workspace.h"

namespace blockffn {

// Which positions a step's tokens see: all before their tree, themselves and their ancestors.
struct Positions {
  int64_t length;       // before the tree
  int64_t num_earlier;  // tokens of the tree before the step
  int64_t num_tokens;   // of the step
  int64_t depth[BLOCKFFN_MAX_STEP];     // of all tokens of the tree
  uint64_t visible[BLOCKFFN_MAX_STEP];  // bit j: token j of the tree

  int64_t in_tree() const { return num_earlier + num_tokens; }
  int64_t count() const { return length + in_tree(); }
  // Of a token of the step: where it lies in the cache, its position in the text, and what it sees of the tree.
  int64_t row(int64_t token) const { return length + num_earlier + token; }
  int64_t of(int64_t token) const { return length + depth[num_earlier + token]; }
  uint64_t seen_by(int64_t token) const { return visible[num_earlier + token]; }

  // False if a parent does not precede its token.
  bool set(const blockffn_step& step) {
    length = step.length;
    num_earlier = step.num_earlier;
    num_tokens = step.num_tokens;
    for (int64_t t = 0; t < in_tree(); ++t) {
      const int64_t parent = step.parents ? step.parents[t] : t - 1;
      if (parent < -1 || parent >= t) return false;
      depth[t] = parent < 0 ? 0 : depth[parent] + 1;
      visible[t] = (parent < 0 ? 0 : visible[parent]) | uint64_t{1} << t;
    }
    return true;
  }
};

// The first and second half of a head as pairs, each turned by its angle.
inline void rotate(const blockffn_model& model, int64_t position, const float* from, float factor, float* to) {
  const int64_t half = model.rope_width / 2;
  const float* cosines = model.rotary + position * model.rope_width;
  const float* sines = cosines + half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = from[i], second = from[i + half];
    to[i] = (first * cosines[i] - second * sines[i]) * factor;
    to[i + half] = (second * cosines[i] + first * sines[i]) * factor;
  }
}

class Attention {
 public:
  // Queries [num_tokens][query_stride] hold the heads one after the other, not rotated yet; `out` likewise gets the heads'
  // values [num_tokens][out_stride].
  struct Job {
    const blockffn_layer* layer;
    int64_t layer_index;
    const float* queries;
    int64_t query_stride;
    float* out;
    int64_t out_stride;
  };

  Attention(const blockffn_model& model, const Kernels& isa, const Positions& positions, int64_t num_threads)
      : model_(model),
        isa_(isa),
        positions_(positions),
        cache_(model),
        keys_(cache_.keys(positions.count())),
        value_inputs_(round_up(positions.count(), 2)),
        groups_(model.num_heads / model.num_key_heads) {
    // Heads that share keys are split so that there is work for all threads, but no further: each task reads the cache.
    const int64_t splits = (num_threads + model.num_key_heads - 1) / model.num_key_heads;
    splits_ = splits < groups_ ? splits : groups_;
  }

  int64_t num_tasks() const { return model_.num_key_heads * splits_; }
  const Cache& cache() const { return cache_; }

  // Memory of `num_threads` threads, as `Workspace` has it.
  void reserve(Workspace& memory, int64_t num_threads) {
    const int64_t values = round_up(Cache::value_width(model_), kStrip), width = round_up(model_.value_width, kStrip);
    query_floats_ = round_up(Cache::value_width(model_), kStrip) + cache_.key_inputs();
    row_bytes_ = largest_row();
    score_floats_ = round_up(keys_.padded_outputs(), 16);
    num_threads *= kMaxTokens;
    at_queries_ = memory.reserve(num_threads * query_floats_ * 4);
    at_rows_ = memory.reserve(num_threads * row_bytes_);
    at_scores_ = memory.reserve(num_threads * score_floats_ * 4);
    at_score_rows_ = memory.reserve(num_threads * score_floats_ * 4);
    at_means_ = memory.reserve(num_threads * (value_floats_ = values > width ? values : width) * 4);
  }
  void use(const Workspace& memory) {
    queries_ = memory.at<float>(at_queries_);
    rows_ = memory.at<uint8_t>(at_rows_);
    scores_ = memory.at<float>(at_scores_);
    score_rows_ = memory.at<uint8_t>(at_score_rows_);
    means_ = memory.at<float>(at_means_);
  }

  // For latent attention: has memory deliver the weights that a task reads first.
  void begin(const blockffn_layer& layer, int64_t task) const {
    const int64_t bytes = Strips(layer.to_latent).total_bytes();
    if (task < num_tasks()) start_reading(layer.to_latent.data + first_head(task) * bytes, bytes);
  }

  void run(const Job& job, int64_t task, int64_t thread) const {
    const int64_t key_head = task / splits_, first = first_head(task), last = first_head(task + 1);
    const int64_t rows = (last - first) * positions_.num_tokens, most = isa_.max_tokens[cache_.format()];
    for (int64_t row = 0; row < rows; row += most)
      attend(job, key_head, first, row, row + most < rows ? row + most : rows, thread);
  }

 private:
  // The heads of a task are those up to the next one's first.
  int64_t first_head(int64_t task) const { return task / splits_ * groups_ + task % splits_ * groups_ / splits_; }
  bool is_latent() const { return model_.attention == BLOCKFFN_LATENT; }

  int64_t largest_row() const {
    int64_t largest = row_bytes(kF32, cache_.key_inputs(), 0);
    for (int64_t layer = 0; is_latent() && layer < model_.num_layers; ++layer) {
      const int64_t keys = Strips(model_.layers[layer].to_latent).activation_bytes();
      const int64_t values = Strips(model_.layers[layer].to_values).activation_bytes();
      largest = keys > largest ? keys : largest;
      largest = values > largest ? values : largest;
    }
    return round_up(largest, 64);
  }

  // Rows begin .. end - 1 of the (head, token) pairs from head `first_head` on: few enough for one call of a kernel.
  void attend(const Job& job, int64_t key_head, int64_t first_head, int64_t begin, int64_t end, int64_t thread) const {
    const int64_t T = positions_.num_tokens, count = end - begin, slot = thread * kMaxTokens;
    float* const queries = queries_ + slot * query_floats_;
    uint8_t* const rows = rows_ + slot * row_bytes_;
    float* const scores = scores_ + slot * score_floats_;
    float* const means = means_ + slot * value_floats_;
    uint8_t* const score_rows = score_rows_ + slot * score_floats_ * 4;
    const int format = cache_.format();

    for (int64_t i = 0; i < count; ++i)
      copy_query(job, first_head + (begin + i) / T, (begin + i) % T, queries + i * query_floats_, rows + i * row_bytes_);
    if (is_latent()) {
      for_each_head(begin, end, [&](int64_t head, int64_t i, int64_t n) {
        multiply_head(job.layer->to_latent, first_head + head, rows + i * row_bytes_, n, queries + i * query_floats_,
                      query_floats_);
        for (int64_t r = i; r < i + n; ++r) rotate_query(job, first_head + head, (begin + r) % T, queries + r * query_floats_);
      });
    }
    for (int64_t i = 0; i < count; ++i)
      isa_.prepare[format](queries + i * query_floats_, Cache::key_width(model_), keys_.inputs, 0, rows + i * row_bytes_);

    const uint8_t* keys = cache_.keys_at(job.layer_index, key_head);
    multiply_strips(
        isa_, keys_, keys, keys_.count(), count, false, Reading::from_to(keys + keys_.total_bytes(), nullptr),
        [&](int64_t i) { return rows + i * row_bytes_; }, [&](int64_t i) { return scores + i * score_floats_; });
    float totals[kMaxTokens];
    for (int64_t i = 0; i < count; ++i) {
      totals[i] = softmax((begin + i) % T, scores + i * score_floats_);
      isa_.prepare[format](scores + i * score_floats_, positions_.count(), value_inputs_, 0,
                           score_rows + i * score_floats_ * 4);
    }
    add_values(job.layer_index, key_head, score_rows, static_cast<int>(count), means);
    for (int64_t i = 0; i < count; ++i) divide(means + i * value_floats_, Cache::value_width(model_), totals[i]);
    store(job, first_head, begin, end, means, rows);
  }

  // For latent attention: the part without position, prepared for its way to the latents. Else the whole query, rotated.
  void copy_query(const Job& job, int64_t head, int64_t token, float* query, uint8_t* row) const {
    const int64_t width = model_.nope_width + model_.rope_width;
    const float* from = job.queries + token * job.query_stride + head * width;
    if (!is_latent()) return rotate(model_, positions_.of(token), from, model_.query_scale, query);
    const Strips matrix(job.layer->to_latent);
    for (int64_t k = 0; k < model_.nope_width; ++k) query[k] = from[k] * model_.query_scale;
    isa_.prepare[matrix.format](query, model_.nope_width, matrix.inputs, matrix.group, row);
  }

  void rotate_query(const Job& job, int64_t head, int64_t token, float* query) const {
    const int64_t width = model_.nope_width + model_.rope_width;
    const float* from = job.queries + token * job.query_stride + head * width + model_.nope_width;
    rotate(model_, positions_.of(token), from, model_.query_scale, query + model_.latent_size);
  }

  // work(head, first row, number of rows) for rows of one head; rows count from `begin`.
  template <typename Work>
  void for_each_head(int64_t begin, int64_t end, Work work) const {
    const int64_t T = positions_.num_tokens;
    for (int64_t row = begin, next; row < end; row = next) {
      next = (row / T + 1) * T < end ? (row / T + 1) * T : end;
      work(row / T, row - begin, next - row);
    }
  }

  void multiply_head(const blockffn_matrix& matrix, int64_t head, const uint8_t* rows, int64_t count, float* outputs,
                     int64_t stride) const {
    const Strips strips(matrix);
    const uint8_t* data = matrix.data + head * strips.total_bytes();
    multiply_strips(
        isa_, strips, data, strips.count(), count, false,
        Reading::from_to(data + strips.total_bytes(), data + strips.total_bytes()),  // the next head's follows
        [&](int64_t i) { return rows + i * row_bytes_; }, [&](int64_t i) { return outputs + i * stride; });
  }

  // exp(scores) where the token sees the position, 0 elsewhere; returns their sum.
  float softmax(int64_t token, float* scores) const {
    const uint64_t visible = positions_.seen_by(token);
    float* own = scores + positions_.length;
    for (int64_t j = 0; j < positions_.in_tree(); ++j)
      if (!(visible >> j & 1)) own[j] = -__builtin_inff();
    const float total = isa_.exponentials(scores, positions_.count());
    for (int64_t j = 0; j < positions_.in_tree(); ++j)
      if (!(visible >> j & 1)) own[j] = 0;
    return total;
  }

  void add_values(int64_t layer, int64_t key_head, const uint8_t* score_rows, int count, float* means) const {
    const uint8_t* rows[kMaxTokens];
    float* outputs[kMaxTokens];
    const int64_t bytes = strip_bytes(cache_.format(), value_inputs_, 0);
    for (int64_t strip = 0; strip < cache_.num_value_strips(); ++strip) {
      for (int i = 0; i < count; ++i) {
        rows[i] = score_rows + i * score_floats_ * 4;
        outputs[i] = means + i * value_floats_ + strip * kStrip;
      }
      const uint8_t* values = cache_.values_at(layer, key_head) + strip * cache_.value_strip_bytes();
      const bool last = strip + 1 == cache_.num_value_strips();
      isa_.strip[cache_.format()](StripCall{
          values, 1, value_inputs_, 0, rows, outputs, count, false, true,
          Reading::from_to(values + bytes, last ? nullptr : values + cache_.value_strip_bytes())});
    }
  }

  static void divide(float* values, int64_t count, float by) {
    for (int64_t k = 0; k < count; ++k) values[k] /= by;
  }

  void store(const Job& job, int64_t first_head, int64_t begin, int64_t end, float* means, uint8_t* rows) const {
    const int64_t T = positions_.num_tokens, width = model_.value_width;
    if (is_latent()) {
      const Strips matrix(job.layer->to_values);
      for (int64_t i = 0; i < end - begin; ++i)
        isa_.prepare[matrix.format](means + i * value_floats_, model_.latent_size, matrix.inputs, matrix.group,
                                    rows + i * row_bytes_);
      for_each_head(begin, end, [&](int64_t head, int64_t i, int64_t n) {
        multiply_head(job.layer->to_values, first_head + head, rows + i * row_bytes_, n, means + i * value_floats_,
                      value_floats_);
      });
    }
    for (int64_t row = begin; row < end; ++row)
      memcpy(job.out + row % T * job.out_stride + (first_head + row / T) * width, means + (row - begin) * value_floats_,
             static_cast<size_t>(width) * 4);
  }

  const blockffn_model& model_;
  const Kernels& isa_;
  const Positions& positions_;
  const Cache cache_;
  const Strips keys_;            // of the positions that the step sees
  const int64_t value_inputs_;   // these positions, as kernels want them
  const int64_t groups_;         // heads that share keys
  int64_t splits_;               // of such a group into tasks

  int64_t query_floats_ = 0, row_bytes_ = 0, score_floats_ = 0, value_floats_ = 0;
  int64_t at_queries_ = 0, at_rows_ = 0, at_scores_ = 0, at_score_rows_ = 0, at_means_ = 0;
  float* queries_ = nullptr;  // [threads][kMaxTokens][query_floats_], and so on
  uint8_t* rows_ = nullptr;
  float* scores_ = nullptr;
  uint8_t* score_rows_ = nullptr;
  float* means_ = nullptr;
};

}  // namespace blockffn
