"""The recorder: the softmaxed attention weights of any model's forward pass, without an edit to the model."""

import torch
import torch.nn.functional as F

from errors import UserError


class AttentionRecorder:
    """Records the attention weights of every layer during a forward pass of `model`, as a context manager.

    `attentions` is a list of (B, heads, N, N), first layer first, query before key, rows summing to 1; with
    gradients=True and after a backward pass, `gradients` is the list of their gradients. `pooling` is (B, N), the
    softmax of a model that pools its tokens, uniform where its attribute `class_token` is False and it has none, else
    None. Each forward pass replaces what the one before left.

    While it is open, torch's scaled_dot_product_attention is one that keeps its weights, nn.MultiheadAttention's fast
    path (which calls nothing that could be replaced) is off, and submodules named `softmax` are hooked. Leaving puts
    all of it back. Raises UserError where a forward pass meets no attention, or a module with `sums_to_one` False.
    """

    def __init__(self, model, *, gradients=False):
        self.model, self.keep_gradients = model, gradients
        self.weights, self.pooling, self.running = [], None, False

    def __enter__(self):
        self.fused = F.scaled_dot_product_attention
        self.fast_path = torch.backends.mha.get_fastpath_enabled()
        F.scaled_dot_product_attention = self.attend_and_keep
        torch.backends.mha.set_fastpath_enabled(False)
        softmaxes = [module for name, module in self.model.named_modules() if name.rpartition(".")[2] == "softmax"]
        self.hooks = [
            self.model.register_forward_pre_hook(self.begin_forward),
            self.model.register_forward_hook(self.end_forward),
            *(module.register_forward_hook(self.keep_softmax) for module in softmaxes),
        ]
        return self

    def __exit__(self, *exception):
        F.scaled_dot_product_attention = self.fused
        torch.backends.mha.set_fastpath_enabled(self.fast_path)
        for hook in self.hooks:
            hook.remove()

    def begin_forward(self, model, inputs):
        self.weights, self.pooling, self.running = [], None, True

    def end_forward(self, model, inputs, output):
        self.running = False
        for module in model.modules():
            if getattr(module, "sums_to_one", None) is False:
                name = type(module).__name__
                raise UserError(f"{name}'s weights are no distribution to draw: attribute.py explains any model")
        if not self.weights:
            raise UserError(f"{type(model).__name__} has no attention to record: attribute.py explains any model")
        if self.pooling is None and getattr(model, "class_token", None) is False:
            weights = self.weights[-1].detach()
            self.pooling = weights.new_full((len(weights), weights.shape[-1]), 1 / weights.shape[-1])

    def keep(self, weights):
        if self.keep_gradients:
            if not weights.requires_grad:
                weights.requires_grad_()
            weights.retain_grad()
        self.weights.append(weights)

    def keep_softmax(self, module, inputs, output):
        if output.ndim == 4:  # (B, heads, N, N): attention that comes about in a way of its own
            self.keep(output)
        else:  # (B, N, 1) or (B, 1, N): sequence pooling
            self.pooling = output.detach().flatten(1)

    def attend_and_keep(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        """torch's scaled_dot_product_attention, written out, in float32 where the inputs are coarser."""
        if not self.running:
            return self.fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        if options.get("enable_gqa"):
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))  # (B, heads, N, N)
        self.keep(weights)
        return F.dropout(weights, dropout_p).to(value.dtype) @ value

    @property
    def attentions(self):
        return [weights.detach() for weights in self.weights]

    @property
    def gradients(self):
        """Raises RuntimeError where there are none: without gradients=True, or before a backward pass."""
        if not self.keep_gradients or any(weights.grad is None for weights in self.weights):
            raise RuntimeError("no gradients yet: AttentionRecorder(model, gradients=True), then a backward pass")
        return [weights.grad for weights in self.weights]
