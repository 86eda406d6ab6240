"""Quality and sparsity of a model on text it has not seen."""
