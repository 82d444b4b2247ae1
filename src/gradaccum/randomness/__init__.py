"""Random draws that belong to a sample, not to a micro-batch."""
