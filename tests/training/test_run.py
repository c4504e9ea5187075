"""What the engines share: a run that lacks a part says which."""

import pytest

from unitok.training.run import TrainingRun


@pytest.mark.parametrize("call", ["sheet(None)", "scores(None)", "report({})"])
def test_a_run_that_lacks_a_method_says_which(call):
    class Bare(TrainingRun):
        def __init__(self):
            pass

    with pytest.raises(NotImplementedError, match=rf"Bare does not define {call.partition('(')[0]}\(\)"):
        eval(f"bare.{call}", {"bare": Bare()})
