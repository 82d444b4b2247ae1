"""What a loss was averaged over, and the seeds that make its micro-batches add up to the batch."""
