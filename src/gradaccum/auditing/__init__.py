"""Is it exact for me? The whole batch's gradient against the accumulated one, and what keeps them apart; see README."""
