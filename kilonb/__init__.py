"""KiloNB: research notebooks that run as experiments, are measured and are swept."""
import os as _os
from importlib import import_module as _import
from pkgutil import iter_modules as _modules

__version__ = "0.2.0"

# torch and numba each start a thread pool. A pool whose idle threads spin takes the core that the other pool needs:
# training took up to five times as long. Read when the pools start, so import kilonb before torch; a value that is
# already set in the environment stays.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# numba raises at import where it can write no cache of compiled functions, and at a call where a cached function is of
# a version whose modules had other names.
_import("kilonb.core.caches").ensure_numba_cache(__path__[0])
_import("kilonb.core.caches").remove_stale_functions(__path__[0], __version__)

_NAMES = {
    "geometry.boxes": "Boxes",
    "geometry.cameras": (
        "DistortedPinholeCamera PinholeCamera Rays Rig blender_to_opencv camera_from_angle orbit_cameras visibility"
    ),
    "geometry.panoramas": "CylindricalCamera EquirectangularCamera range_of_depth roll_columns",
    "geometry.rig_checks": "check_rig",
    "geometry.transforms": "look_at quat_to_rotmat rotmat_to_quat",
    "splats.gaussians": "Gaussians gaussians_from_points",
    "splats.formats": "read_gaussians write_gaussians",
    "splats.ply": "read_ply write_ply",
    "splats.rasterizer": "Render rasterize render_gaussians",
    "splats.contributions": "largest_contributions prune_gaussians",
    "splats.fit": "fit_gaussians",
    "splats.fit_config": "DefaultStrategy FitConfig MCMCStrategy",
    "splats.lookup": "GaussianLookup",
    "scenes.argoverse2": "load_argoverse2",
    "scenes.blender": "BlenderScene load_blender write_blender",
    "scenes.brickyard": "build_brickyard write_brickyard",
    "scenes.opv2v": "load_opv2v",
    "scenes.photographs": "open_views points_of_scene",
    "scenes.nuscenes": "load_nuscenes",
    "scenes.pandaset": "load_pandaset",
    "scenes.rig": "load_rig write_rig",
    "scenes.surround": "load_surround panorama_pose",
    "scenes.tracks": "build_tracks",
    "scenes.v2xsim": "load_v2xsim",
    "fields.occupancy": "OccupancyGrid occupancy_from_gaussians occupancy_from_silhouettes",
    "fields.hashgrid": "HashGridConfig HashGridField",
    "fields.kilonerf": "KiloNeRF KiloNeRFConfig",
    "fields.mlp": "MLPConfig MLPField",
    "fields.rendering": "render_image render_rays",
    "coop.dataset": "CooperativeDataset collate",
    "panoramas.stitch": "Panorama Stitcher ground_range range_disagreement seam_statistics stitch",
    "distill.orbit": "Orbit",
    "distill.space": "occupancy_of_gaussians visual_hull",
    "distill.rays": "RayPool",
    "imaging.targets": "ViewTarget targets_from_images targets_from_teacher",
    "distill.alpha": "AlphaBand AlphaBandConfig OpacityTarget OpacityTargetConfig",
    "imaging.agreement": "check_agreement",
    "imaging.scoring": "evaluate_frames",
    "imaging.summaries": "summarise_runs",
    "distill.features": "FeatureConfig FeatureTerm",
    "imaging.frames": "recomposite",
    "imaging.picture_folders": "score_pictures",
    "imaging.rendering": "render_frames",
    "imaging.sources": "open_source",
    "distill.data": "DistillationData distillation_data_from_ply distillation_data_from_views open_distillation_data",
    "distill.losses": "ResponseLossConfig Term",
    "distill.multiview": "TeachingConfig teach",
    "distill.points": "PointsConfig distill_points visible_space",
    "distill.seams": "Continuity seam_error",
    "distill.student": "DistillConfig Student load_student make_student save_student",
    "flux4d.clip_data": "load_clip",
    "flux4d.clips": "clips_of",
    "flux4d.evaluation": "score_views",
    "flux4d.lift": "LiftOptions",
    "flux4d.motion": "MovingGaussians load_moving save_moving",
    "flux4d.network": "ReconstructionConfig ReconstructionNetwork",
    "flux4d.render": "render_at",
    "flux4d.scene_fit": "SceneFitConfig fit_scene",
    "flux4d.training": "ReconstructionTraining train_reconstruction",
    "flux4d.voxel_flow": "clip_velocities estimate_flow estimate_pair_flow",
    "dream.actor_critic": "ActorCritic ActorCriticConfig",
    "dream.agent": "AgentTraining load_agent save_agent train_agent",
    "dream.boundaries": "BoundaryScoring score_boundaries",
    "dream.collection": "play_episodes",
    "dream.episodes": "Episode collect read_episode read_recordings write_episode",
    "dream.pinpad": "PinPad PinPadVector",
    "dream.readout": "imagination_scores",
    "dream.replay": "Replay",
    "dream.training": "WorldModelTraining train_world_model",
    "dream.vta": "VTA VTAConfig boundary_record load_vta save_vta",
    "dream.vta_training": "VTATraining make_vta train_vta vta_condition",
    "dream.world_model": "WorldModel WorldModelConfig load_world_model save_world_model",
    "metrics.events": "score_events",
    "pose.carve": "VoxelGrid carve draw_hull",
    "pose.doctor": "examine",
    "pose.model": "PoseConfig PoseModel draw_animal",
    "pose.prepare": "PrepareConfig prepare prepared_of",
    "pose.prepared": "PreparedRecording read_prepared",
    "pose.refine": "RefineConfig animal_predictor",
    "pose.scores": "score_recording",
    "pose.training": "PoseTraining load_pose make_pose_model save_pose train_pose",
    "scenes.critter": "CritterConfig write_critter",
    "scenes.multiview": "Recording read_recording",
    "data.video": "read_video write_video",
    "metrics.flow": "FlowTruth score_flow",
    "metrics.images": "blank_baseline_db evaluate_image foreground_psnr_db psnr_linear_db psnr_srgb_db self_check ssim",
    "metrics.perceptual": "lpips",
    "sharing.export": "ExportOptions export_run",
    "sharing.view": "view_run write_view",
    "training.checkpoints": "seed_everything",
    "training.loggers": "Logger add_logger register_logger",
    "training.loop": "LoopConfig train",
    "training.parallel": "DistributedSteps World join world_from_environment",
    "training.session": "open_session",
    "core.errors": "KiloError",
    "batch.execution": "run_notebook",
    "runs.gates": "Gate",
    "data.references": "resolve_data",
    "reports.dashboard": "open_dashboard write_dashboard",
    "reports.run_browser": "RunBrowser",
    "reports.sweep_explorer": "SweepExplorer",
    "batch.launch": "launch",
    "runs.notebooks": "read_notebook",
    "reports.report": "write_report",
    "runs.folders": "open_run",
    "runs.records": "read_run",
    "batch.scheduling": "run_sweep",
    "batch.sweeps": "plan_sweep",
}
# Public names of 0.1 and what they are called now: asking for the old one fails with a sentence that names the new one.
_RENAMED: dict[str, str] = {
    "Lesson": "DistillationData",
    "evaluate": "evaluate_frames",
    "lesson_from_ply": "distillation_data_from_ply",
    "lesson_from_views": "distillation_data_from_views",
    "open_lesson": "open_distillation_data",
    "space_of_teacher": "occupancy_of_gaussians",
    "seen_space": "visible_space",
    "space_of_views": "visual_hull",
    "fit_teacher": "fit_gaussians",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Import a public name from its module on first use; `import kilonb` itself imports nothing."""
    if name in _RENAMED: raise AttributeError(f"kilonb.{name} of 0.1 is now called kilonb.{_RENAMED[name]}.")
    if name not in _HOMES: raise AttributeError(f"module 'kilonb' has no attribute '{name}'")
    globals()[name] = value = getattr(_import(f"kilonb.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})


def _open(package) -> None:
    """Import the modules of a package on first use: `kilonb.splats.rasterizer`."""
    def fetch(name: str):
        if name not in {found.name for found in _modules(package.__path__)}:
            raise AttributeError(f"module '{package.__name__}' has no attribute '{name}'")
        return _import(f"{package.__name__}.{name}")

    package.__getattr__ = fetch
    package.__dir__ = lambda: sorted({*vars(package), *(found.name for found in _modules(package.__path__))})


for _package in _modules(__path__):
    if _package.ispkg: _open(_import(f"kilonb.{_package.name}"))
