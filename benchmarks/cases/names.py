"""Names of cases and contenders, for those who read a file of figures without torch."""

FORWARD = "token_logprobs forward"
LOGPROBS = "token_logprobs forward+backward"
STATS = "token_stats (entropy) forward"
POLICY = "logits_policy_loss forward+backward"
TWO = "two models: logprob, entropy, exact KL, forward"
TWO_BOTH = "two models: logprob, entropy, exact KL, forward+backward"
ONE_LAUNCH = ", op with the gradient in the forward"
HEADS = ("linear_policy_loss", "linear_token_stats", "linear_token_logprobs")
PRODUCTS = "{} cuBLAS products"


def of_head(name, shape):
    """The name of a fused head's case at ``(tokens, hidden, vocab)``."""
    return f"{name} {list(shape)} forward+backward"
