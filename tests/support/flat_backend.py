"""The functions of a backend over rows, with flat arguments instead of the tuples of the protocol."""

from rlkernels.backends.protocol import PolicyInputs, RowBatch, SavedRows, Upstream


class Flat:
    """``Flat(backend).token_stats(logits, targets, ...)``: the fields of each tuple of the protocol in their order."""

    def __init__(self, backend):
        self.backend = backend

    def token_stats(self, *arguments):
        *rows, wanted = arguments
        return self.backend.token_stats(RowBatch(*rows), wanted)

    def token_stats_backward(self, *arguments):
        upstream, rows, saved, rest = arguments[:3], arguments[3:9], arguments[9:15], arguments[15:]
        return self.backend.token_stats_backward(Upstream(*upstream), RowBatch(*rows), SavedRows(*saved), *rest)

    def fused_policy(self, objective, *arguments):
        rows, terms, rest = arguments[:5], arguments[5:12], arguments[12:]
        return self.backend.fused_policy(RowBatch(*rows), PolicyInputs(objective, *terms), *rest)
