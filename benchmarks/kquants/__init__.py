"""k-quants rounded by curvature beside ggml's own, and the speed of both searches of blocks."""
