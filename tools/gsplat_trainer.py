"""Run gsplat's examples/simple_trainer.py on a CPU, with no change to it but its device.

    python tools/gsplat_trainer.py PATH_OF_A_GSPLAT_CHECKOUT COLMAP_SCENE RESULT_FOLDER [--steps 300] [-- MORE OPTIONS]

The options after `--` go to the trainer, "default" or "mcmc" first. The line that sets the device is replaced in
memory: `self.device = f"cuda:{local_rank}"` becomes `self.device = "cpu"`. `torch.cuda.synchronize`, which the
evaluation calls for its timing, does nothing. Packages of examples/requirements.txt that cannot be imported are
replaced by the least that the trainer uses of them, and the replacements are printed:

- pycolmap.SceneManager (not on PyPI): read by kilonb.geometry.colmap;
- fused_ssim (a CUDA extension): torchmetrics' SSIM, padding "valid";
- nerfview, viser, imageio's video: only the names; the viewer is off;
- LPIPS, whose network would be downloaded: not a number.

`kilonb.scenes.brickyard_photographs.write_brickyard_photographs` writes a scene. The trainer prints PSNR of its test
views after the first step and at the end. Nothing is downloaded.
"""
import argparse
import importlib
import os
import sys
import types
from pathlib import Path

DEVICE_LINE, CPU_LINE = 'self.device = f"cuda:{local_rank}"', 'self.device = "cpu"'


def scene_manager():
    """A class with what datasets/colmap.py uses of rmbrualla's SceneManager."""
    import numpy as np

    from kilonb.geometry.colmap import read_colmap

    class SceneManager:
        """Cameras, pictures and points of a COLMAP model."""

        def __init__(self, folder): self.model = read_colmap(folder)

        def load_cameras(self):
            """Calibrations: one for each picture, as COLMAP's SIMPLE_RADIAL or PINHOLE."""
            self.cameras = {}
            for number, camera in enumerate(self.model.cameras.values()):
                k1, *others = [float(value) for value in getattr(camera, "distortion", (0.0,))]
                if any(others): raise SystemExit("Only the distortion k1 is supported: undistort the pictures first.")
                self.cameras[number] = types.SimpleNamespace(
                    fx=camera.fx, fy=camera.fy, cx=camera.cx, cy=camera.cy, width=camera.width, height=camera.height,
                    camera_type="SIMPLE_RADIAL" if k1 else "PINHOLE", k1=k1)

        def load_images(self):
            """Poses of the pictures."""
            self.images, self.name_to_image_id = {}, {}
            for number, (name, camera) in enumerate(self.model.cameras.items()):
                pose = camera.world_to_camera.double().numpy()
                self.images[number] = types.SimpleNamespace(R=lambda pose=pose: pose[:3, :3], tvec=pose[:3, 3],
                                                            camera_id=number, name=name)
                self.name_to_image_id[name] = number

        def load_points3D(self):
            """Points and colours; which picture sees which is not used without a depth loss."""
            self.points3D, self.point3D_colors = self.model.points, self.model.colours
            self.point3D_errors = np.zeros(len(self.model.points))
            self.point3D_id_to_images, self.point3D_id_to_point3D_idx = {}, {}

    return SceneManager


def ssim_function():
    """fused_ssim's function on torchmetrics."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    def fused_ssim(pictures, targets, padding="same"):
        whole = structural_similarity_index_measure(pictures, targets, data_range=1.0, return_full_image=True)[1]
        return (whole[..., 5:-5, 5:-5] if padding == "valid" else whole).mean()

    return fused_ssim


def stand_in(name, **contents):
    """Put a module of this name and contents into `sys.modules` where it cannot be imported; True if it was needed."""
    try:
        module = importlib.import_module(name)
        if all(hasattr(module, key) for key in contents): return False
    except ImportError: pass
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    return True


def empty_class(name): return type(name, (), {"__init__": lambda self, *a, **k: None})


def provide_packages():
    """Replace what cannot be imported; returns the names."""
    import torch
    import torchmetrics.image.lpip

    class Lpips(torch.nn.Module):
        """Not a number, in place of a network that would be downloaded."""

        def __init__(self, **_): super().__init__()
        def forward(self, pictures, targets): return torch.tensor(float("nan"))

    torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity = Lpips
    viewer = {name: empty_class(name) for name in ("CameraState", "RenderTabState", "Viewer")}
    needed = {"pycolmap": dict(SceneManager=scene_manager()), "fused_ssim": dict(fused_ssim=ssim_function()),
              "nerfview": viewer | {"apply_float_colormap": None},
              "viser": dict(ViserServer=None, GuiEvent=None, ClientHandle=None, GuiInputHandle=None)}
    return [name for name, contents in needed.items() if stand_in(name, **contents)] + ["LPIPS"]


def main(arguments=None):
    """Run the trainer; returns nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("scene", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, more = parser.parse_args(arguments[:cut]), arguments[cut + 1:] or ["default"]
    script = (options.checkout / "examples" / "simple_trainer.py").resolve()
    source = script.read_text(encoding="utf-8")
    if source.count(DEVICE_LINE) != 1: parser.error(f"{script} does not set its device in the line {DEVICE_LINE!r}.")
    sys.path[:0] = [str(script.parent), str(options.checkout.resolve())]
    import torch

    from kilonb.splats.gsplat_compat import install
    print("gsplat from", install(), "- replaced:", ", ".join(provide_packages()))
    if not torch.cuda.is_available(): torch.cuda.synchronize = lambda *_: None
    steps = str(options.steps)
    sys.argv = [str(script), *more, "--data_dir", str(options.scene.resolve()), "--data_factor", "1",
                "--result_dir", str(options.result.resolve()), "--max_steps", steps, "--eval_steps", "1", steps,
                "--disable_viewer", "--disable_video"]
    os.environ.setdefault("MPLBACKEND", "Agg")
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    exec(compile(source.replace(DEVICE_LINE, CPU_LINE), str(script), "exec"), vars(module))


if __name__ == "__main__": main()
