"""Running models: requests in, tokens out, many sequences at a time.

- `sampling_params`: what a caller may ask for, checked
- `structured_outputs`, `grammar`: the form that text may have to have, and what it means for tokens
- `request`: one sequence on its way through, and the text it has produced
- `block_manager`: which pages of the cache are free
- `scheduler`: which sequences run in the next step
- `batch`: the arrays of one step, padded to a few sizes
- `step`: the step itself: one pure function
- `runner`: compiled steps, the cache, and what stays on the device between steps
- `engine`: the loop
- `async_engine`: the loop in a thread, for callers in event loops
- `compile_cache`: programs kept on disk
"""
