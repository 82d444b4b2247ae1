"""A batch into micro-batches: by samples, or by what samples cost."""
