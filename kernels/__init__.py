"""The three operations that dominate the method: linear_logprob, grpo_loss, memory_attention (and memory_decode)."""
