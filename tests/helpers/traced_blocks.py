"""Small decoder blocks in which what feeds what is, or only looks like, a pair to scale."""

import torch
from torch import nn

WIDTH = 16
INNER = 24
TOKENS = 12


class Norm(nn.Module):
    """An RMS norm that multiplies by its weight plus an offset."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(1 - offset + torch.randn(WIDTH) / 4)

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt() * (self.offset + self.weight)


class Block(nn.Module):
    """A gated feed-forward half of a block, and what can be wrong with one."""

    def __init__(self, offset: float = 0.0, count: int = 1) -> None:
        super().__init__()
        self.norm = Norm(offset)
        self.gate = nn.Linear(WIDTH, INNER)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        read = self.norm(x)
        return x + self.down(self.between(nn.functional.silu(self.gate(read)), self.up(read)))

    def between(self, gate, up):
        return gate * up


class Clamped(Block):
    """No value of these tokens reaches the limit."""

    def between(self, gate, up):
        return gate * up.clamp(-50, 50)


class ReadElsewhere(Block):
    """What the norm gives goes around the layers as well."""

    def forward(self, x):
        return super().forward(x) + self.norm(x).tanh()


class ReadByConvolution(Block):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        read = self.norm(x)
        out = self.down(nn.functional.silu(self.gate(read)) * self.up(read))
        return x + out + self.convolution(read.T).T.sigmoid()


class ReadInVain(Block):
    """What the norm gives also goes where nothing comes of it in this run."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv1d(WIDTH, WIDTH, 1)
        nn.init.zeros_(self.side.weight)

    def forward(self, x):
        read = self.norm(x)
        out = self.down(nn.functional.silu(self.gate(read)) * self.up(read))
        return x + out + self.side(read.T).T


class Kept(Block):
    """Later blocks read what up gives."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["cache"] = {}

    def between(self, gate, up):
        self.cache["up"] = up.view(-1)
        return gate * up


class UsedTwice(Block):
    """The weight of a layer is used without the layer."""

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, self.up.weight).mean(-1, keepdim=True)


class Normalized(Block):
    """Between up and down is a norm without a weight."""

    def between(self, gate, up):
        return nn.functional.layer_norm(gate * up, (INNER,))


class Copied(Block):
    """Its layers read copies and other shapes of one tensor."""

    def forward(self, x):
        read = self.norm(x)
        gate = self.gate(read.view(2, -1, WIDTH)).view(-1, INNER)
        return x + self.down(nn.functional.silu(gate) * self.up(read.clone()))


class Written(Block):
    """The memory that its layers read is written to between them."""

    def forward(self, x):
        read = self.norm(x)
        gate = nn.functional.silu(self.gate(read))
        return x + self.down(gate * self.up(read.add_(1)))


class Loud(Block):
    """It never returns the same twice."""

    def forward(self, x):
        return super().forward(x) + torch.rand(1)


class Untraceable(Block):
    """It asks for the memory of a tensor, which a tensor without memory has not."""

    def forward(self, x):
        from torch.utils._python_dispatch import _get_current_dispatch_mode

        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("no mode can be active here")
        return super().forward(x)


class Sorting(nn.Linear):
    """A linear layer by its class alone."""

    def forward(self, x):
        return super().forward(x.sort(-1).values)


class Attention(nn.Module):
    """Four heads of queries on some heads of values."""

    def __init__(self, kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.norm = Norm(1.0)
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, 4 * kv_heads)
        self.v = nn.Linear(WIDTH, 4 * kv_heads)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        read = self.norm(x)
        q, k, v = (
            layer(read).view(len(x), -1, 4).transpose(0, 1)[None]
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + self.o(mixed[0].transpose(0, 1).reshape(len(x), -1))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, INNER)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.between(self.up(x)))

    def between(self, up):
        return up


class Numbered(nn.ModuleList):
    """Layers of which the first alone is called."""

    def __init__(self) -> None:
        super().__init__([nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)])

    def forward(self, x):
        return self[0](x)


class BentExpert(Expert):
    def between(self, up):
        return up.tanh()


class Mixture(nn.Module):
    """Experts behind a router that is a linear layer; only the first ones are chosen."""

    def __init__(self, count: int = 4, used: int = 2, sends: bool = True) -> None:
        super().__init__()
        self.norm = Norm()
        self.router = nn.Linear(WIDTH, count, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(count))
        self.used = used
        self.sends = sends

    def forward(self, x):
        read = self.norm(x)
        scores = self.router(read)[:, : self.used].softmax(-1)
        weight, chosen = scores.topk(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.sends:
                (rows,) = torch.where(chosen[:, 0] == number)
                if len(rows):
                    out = out.index_add(0, rows, expert(read[rows]) * weight[rows])
            else:  # every expert computes every token
                out = out + expert(read) * (chosen == number) * weight
        return out
