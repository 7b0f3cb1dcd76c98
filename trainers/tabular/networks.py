"""Networks that tell real from synthetic, one for every level: logits, positive where real."""

import torch
from torch import Tensor, nn


class TokenNet(nn.Module):
    """A bidirectional LSTM over tokens: one logit for each, which knows the text on both sides."""

    def __init__(self, tokens: int, columns: int, features: int, width: int = 32, hidden: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.column = nn.Embedding(columns + 1, width)
        self.value = nn.Sequential(nn.Linear(features, width), nn.GELU(), nn.Linear(width, width))
        self.forwards = nn.LSTM(width, hidden, batch_first=True)
        self.backwards = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(self, ids: Tensor, lengths: Tensor, token_columns: Tensor, values: Tensor) -> Tensor:  # -> [N, T]
        nothing = values.new_zeros(len(values), 1, values.shape[2])  # for tokens in no clause
        clauses = self.value(torch.cat([values, nothing], 1)) + self.column.weight
        inputs = self.token(ids) + _gather(clauses, token_columns)
        # Each text is turned round within its length, so that padding comes last in both directions and changes nothing.
        # Packed sequences would do the same, five times slower on a CPU.
        places = torch.arange(ids.shape[1]).expand_as(ids)
        turned = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)
        before, after = self.forwards(inputs)[0], self.backwards(_gather(inputs, turned))[0]
        return self.head(torch.cat([before, _gather(after, turned)], -1)).squeeze(-1)


def _gather(states: Tensor, places: Tensor) -> Tensor:
    return states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))


class SentenceNet(nn.Module):
    """One clause at a time, from its column and its value alone: is this a value that the column has?"""

    def __init__(self, columns: int, features: int, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.column = nn.Embedding(columns, width)
        self.layers = nn.Sequential(
            nn.Linear(width + features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, values: Tensor) -> Tensor:  # [N, C, F] -> [N, C]
        columns = self.column.weight.expand(len(values), -1, -1)
        return self.layers(torch.cat([columns, values], -1)).squeeze(-1)


class RowNet(nn.Module):
    """All clauses at once, each encoded and put in its column's place, so that their order in the text is nothing to it."""

    def __init__(self, columns: int, features: int, width: int = 16, hidden: int = 96) -> None:
        super().__init__()
        self.column = nn.Embedding(columns, width)
        self.clause = nn.Sequential(nn.Linear(width + features, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.GELU())
        self.row = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(columns * width, hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, 1),
        )

    def forward(self, values: Tensor) -> Tensor:  # [N, C, F] -> [N]
        columns = self.column.weight.expand(len(values), -1, -1)
        return self.row(self.clause(torch.cat([columns, values], -1))).squeeze(-1)


class GroupNet(nn.Module):
    """A perceptron over the values of one feature group."""

    def __init__(self, columns: int, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(columns * features, hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, 1),
        )

    def forward(self, values: Tensor) -> Tensor:  # [N, columns of the group, F] -> [N]
        return self.layers(values).squeeze(-1)
