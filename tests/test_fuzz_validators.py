"""Each validator of the fuzzer finds a wrong value: a check that accepts everything proves nothing."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.fuzz import validators as v
from tests.fuzz.engine import all_readers

NAN = float("nan")
EYE = np.eye(4)


def _camera(**changes):
    pose = torch.eye(4)
    return SimpleNamespace(**{"width": 4, "height": 3, "fx": 2.0, "fy": 2.0, "cx": 1.0, "cy": 1.0,
                              "camera_to_world": pose, **changes})


def _episode(**changes):
    kept = {"actions": np.zeros(2, int), "images": np.zeros((2, 4, 4, 3), np.uint8), "rewards": np.zeros(2),
            "is_first": [0, 0], "is_last": [0, 0], "is_terminal": [0, 0], "positions": np.zeros((2, 2)),
            "sequences": [0, 0], "events": {}}
    return SimpleNamespace(**{**kept, **changes})


def _frame(**changes):
    kept = {"alpha": torch.ones(2, 3), "rgb_premultiplied": torch.ones(2, 3, 3), "expected_depth": None, "seconds": 0.1,
            "samples_per_ray": None, "name": "a", "identity": "b"}
    return SimpleNamespace(**{**kept, **changes})


class _Boxes(SimpleNamespace):
    def __len__(self):
        return 1


def _boxes(**changes):
    return _Boxes(**{"labels": ("a",), "identities": ("b",), "sizes": torch.ones(1, 3),
                     "box_to_world": torch.eye(4)[None], **changes})


class _Gaussians(SimpleNamespace):
    def __len__(self):
        return 2

    def parameters(self):
        return {"means": self.means, "log_scales": self.log_scales, "quats": self.quats}


def _gaussians(**changes):
    return _Gaussians(**{"means": torch.zeros(2, 3), "log_scales": torch.zeros(2, 3), "quats": torch.ones(2, 4),
                         **changes})


def _tile(**changes):
    return SimpleNamespace(**{"coverage": np.ones((2, 3), bool), "rgb": np.zeros((2, 3, 3), np.uint8),
                              "classes": np.zeros((2, 3), np.uint8), "range_m": np.ones((2, 3)), "camera_to_world": EYE,
                              **changes})


def _recording(**changes):
    return SimpleNamespace(**{"cameras": {"a": _camera()}, "unit_m": 1.0, "fps": 30.0, "keypoints": None, **changes})


def _sweep(*parts):
    return SimpleNamespace(_asdict=lambda: {str(k): part for k, part in enumerate(parts)})


def _surround(**changes):
    return SimpleNamespace(**{"cameras": {"a": _camera()}, "vehicle_to_world": torch.eye(4), "boxes": _boxes(),
                              **changes})


def _model(value):
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, value)
    return model


MIRROR = np.diag([1.0, 1, -1, 1])
CASES = {
    "wrong_number": (2.5, [NAN, True, "1", None, float("inf"), 1e31]),
    "wrong_pose": (EYE, [EYE * NAN, 2 * EYE, MIRROR, np.eye(3), EYE + np.eye(4)[::-1]]),
    "wrong_camera": (_camera(), [_camera(fx=NAN), _camera(fy=0.0), _camera(width=0), _camera(height=True),
                                 _camera(camera_to_world=torch.eye(4) * 2), _camera(distortion=(0.1, NAN))]),
    "wrong_boxes": (_boxes(), [_boxes(sizes=torch.zeros(1, 3)), _boxes(labels=()), _boxes(sizes=torch.ones(1, 3) * NAN),
                               _boxes(box_to_world=torch.zeros(1, 4, 4))]),
    "wrong_gaussians": (_gaussians(), [_gaussians(means=torch.full((2, 3), NAN)), _gaussians(quats=torch.zeros(2, 4)),
                                       _gaussians(log_scales=torch.full((2, 3), 800.0)),
                                       _gaussians(means=torch.zeros(3, 3))]),
    "wrong_times": ([0.0, 1.0], [[0.0, 0.0], [0.0, NAN], [1.0, 0.0]]),
    "wrong_sweep": (_sweep(torch.ones(2)), [_sweep(torch.full((2,), NAN)), _sweep(torch.ones(2), torch.ones(3))]),
    "wrong_picture": (np.zeros((2, 3, 3), np.uint8), [np.full((2, 3), NAN), np.zeros((2, 3, 7)), np.zeros((0, 3)),
                                                      np.full((2, 3), 2.0)]),
    "wrong_depth": (torch.ones(2, 3), [-torch.ones(2, 3), torch.ones(3), torch.full((2, 3), 1e31)]),
    "wrong_frame": (_frame(), [_frame(alpha=torch.full((2, 3), NAN)), _frame(alpha=torch.full((2, 3), 2.0)),
                               _frame(seconds=NAN), _frame(seconds=-1.0), _frame(name=3),
                               _frame(expected_depth=-torch.ones(2, 3)),
                               _frame(rgb_premultiplied=torch.ones(2, 2, 3))]),
    "wrong_tile": (_tile(), [_tile(range_m=-np.ones((2, 3))), _tile(range_m=np.full((2, 3), NAN)),
                             _tile(classes=np.full((2, 3), 9)), _tile(camera_to_world=2 * EYE)]),
    "wrong_episode": (_episode(), [_episode(rewards=np.full(2, NAN)), _episode(actions=np.array([0, -1])),
                                   _episode(is_last=[0]), _episode(images=np.zeros((2, 4, 4, 3)))]),
    "wrong_tensors": ({"a": torch.ones(1)}, [{"a": torch.tensor([NAN])}, {"a": torch.tensor([float("inf")])}]),
    "wrong_module": (_model(1.0), [_model(NAN)]),
    "wrong_table": ({"a": np.ones(2)}, [{"a": np.ones(2), "b": np.ones(3)}, {"a": np.ones((2, 2))}, {3: np.ones(2)}]),
    "wrong_calibration": (SimpleNamespace(camera=_camera), [SimpleNamespace(camera=lambda: _camera(fx=-1.0))]),
    "wrong_recording": (_recording(), [_recording(unit_m=NAN), _recording(unit_m=0.0), _recording(fps=0.0),
                                       _recording(cameras={"a": _camera(cx=NAN)})]),
    "wrong_surround": (_surround(), [_surround(cameras={}), _surround(vehicle_to_world=torch.zeros(4, 4)),
                                     _surround(boxes=_boxes(labels=()))]),
    "wrong_names": (["a.png"], [["../a.png"], [3], ["a/b"]]),
}


def test_all_validators_are_here():
    found = {name for name, one in inspect.getmembers(v, inspect.isfunction) if name.startswith("wrong_")}
    assert found - {"wrong_numbers"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_value_is_found_and_a_right_one_accepted(name):
    right, wrongs = CASES[name]
    check = getattr(v, name)
    assert check(right) == ""
    assert all(check(wrong) for wrong in wrongs), [str(wrong)[:80] for wrong in wrongs if not check(wrong)]


def test_arrays_are_checked_for_numbers_shape_and_size():
    assert v.wrong_numbers(np.ones(3), "x", (3,)) == "" == v.wrong_numbers([NAN], "x", nan=True)
    wrongs = ([NAN], [float("inf")], [1e31], ["a"], np.ones((2, 2)))
    assert all(v.wrong_numbers(one, "x", (1,)) for one in wrongs)


FREE = {"yaml"}  # what a YAML document may hold is said by its own reader


def test_the_check_of_every_reader_can_fail():
    """A value of another type is never called sane: it fails the check, or cannot be checked."""

    def finds(check):
        for value in (NAN, {"a": NAN}, [object()], SimpleNamespace(), object()):
            try:
                if check(value):
                    return True
            except Exception:
                return True
        return False

    blind = {name for name, reader in all_readers().items() if not finds(reader.check)}
    assert blind <= FREE, f"the checks of {sorted(blind - FREE)} accept everything"
