"""What the parts of a run refuse."""

import make
import pytest

import parts


@pytest.mark.parametrize(
    "word, line",
    [
        ("method.name=other", "method.name: 'other' is not one of meanflow | "),
        (
            "method.name=flow method.tangent=1,1",
            "method.tangent is no option of method.name flow, which has noise_dist, ",
        ),
        ("model.cls=DiT_B_3", "model.cls: unknown network 'DiT_B_3'; known: DiT_S_2, "),
        ("model.cls=DiT", "model.cls: DiT needs model.depth, model.hidden_size, model.num_heads, "),
        (
            "sampling.method=rk4",
            "sampling.method is of ode | euler | heun | consistency, not 'rk4'",
        ),
        ("sampling.omega=2", "sampling.omega: the guidance of method.name meanflow is trained in"),
    ],
)
def test_what_a_part_does_not_have_is_refused_by_name(word, line):
    with pytest.raises(ValueError) as caught:
        parts.check(make.config(*word.split()))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
