"""Video files: what is written is read again, with its time stamps; damaged and misleading files are refused."""
import itertools
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from helpers import real_data
from kilonb.core.errors import KiloError
from kilonb.data import video
from kilonb.data.video import frame_times, read_video, video_info, write_video
from kilonb.imaging.video import pictures_in_row, video_sheet


def moving_frame(k: int, width: int = 96, height: int = 64) -> np.ndarray:
    """A smooth pattern that moves by one pixel a frame."""
    v, u = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([0.5 + 0.4 * np.sin((u + k) / 9), v / height, 0.5 + 0.4 * np.cos((u - k + v) / 13)], -1)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(np.square(a.astype(float) / 255 - b.astype(float) / 255).mean())


def write_stamped(path, stamps_ms, **options):
    """A video whose frame k has the time stamp stamps_ms[k]; made with PyAV alone."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, stamp in enumerate(stamps_ms):
            frame = av.VideoFrame.from_ndarray((moving_frame(k) * 255).astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name, quality, least_db", [("a.mp4", 20, 38), ("a.mov", 20, 38), ("a.mkv", 20, 38),
                                                     ("a.mp4", 1, 46), ("a.mp4", 40, 28)])
def test_a_video_that_is_read_again_shows_what_was_written(tmp_path, name, quality, least_db):
    """Tolerances: an encoder at rate factor 20 is near 40 dB on a smooth picture, 6 steps cost about 3 dB."""
    path = write_video(tmp_path / name, map(moving_frame, range(30)), fps=24, quality=quality)
    frames = list(read_video(path))
    assert [frame.number for frame in frames] == list(range(30))
    assert min(psnr_db(frame.rgb, moving_frame(frame.number) * 255) for frame in frames) > least_db


def test_the_second_codec_writes_what_it_is_given(tmp_path):
    path = write_video(tmp_path / "a.mp4", map(moving_frame, range(10)), fps=10, codec="hevc")
    assert video_info(path).codec == "hevc" and video_info(path).frames == 10
    assert min(psnr_db(frame.rgb, moving_frame(frame.number) * 255) for frame in read_video(path)) > 38


def test_a_frame_is_found_at_its_own_number_and_not_beside_it(tmp_path):
    """Off by one in seeking or in the order of presentation would give a neighbour."""
    path = write_video(tmp_path / "a.mp4", map(moving_frame, range(60)), fps=10)
    for start, stop, step in ((0, 60, 7), (21, 60, 1), (59, 60, 1), (40, 43, 2)):
        for frame in read_video(path, start, stop, step):
            scores = [psnr_db(frame.rgb, moving_frame(k) * 255) for k in range(60)]
            assert int(np.argmax(scores)) == frame.number
    assert [frame.number for frame in read_video(path, 40, 47, 3)] == [40, 43, 46]


@pytest.mark.parametrize("fps", [10, 24, 29.97, 120])
def test_time_stamps_are_number_over_rate(tmp_path, fps):
    path = write_video(tmp_path / "a.mp4", map(moving_frame, range(25)), fps=fps)
    np.testing.assert_allclose(frame_times(path), np.arange(25) / fps, atol=1e-4)      # MP4 ticks
    info = video_info(path)
    assert info.fps == pytest.approx(fps, rel=1e-3) and info.frames == 25
    assert info.duration_s == pytest.approx(25 / fps, rel=1e-3)


def test_uneven_time_stamps_are_read_as_they_are(tmp_path):
    """number / fps would be wrong by half a second here."""
    stamps = [0, 40, 80, 500, 540, 1000, 1010]
    path = write_stamped(tmp_path / "a.mkv", stamps)
    np.testing.assert_allclose([frame.time_s for frame in read_video(path)], np.array(stamps) / 1000, atol=1e-6)
    assert [frame.time_s for frame in read_video(path, 3, 6, 2)] == pytest.approx([0.5, 1.0])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_a_video_cut_at_any_place_is_refused_in_one_sentence(tmp_path, suffix):
    whole = write_video(tmp_path / f"whole.{suffix}", map(moving_frame, range(30)), fps=10).read_bytes()
    for share in (0.0, 0.02, 0.1, 0.3, 0.6, 0.9, 0.97):
        cut = tmp_path / f"cut{share}.{suffix}"
        cut.write_bytes(whole[:int(share * len(whole))])
        for use in (video_info, lambda path: next(read_video(path))):
            with pytest.raises(KiloError) as raised: use(cut)
            assert "\n" not in str(raised.value) and cut.name in str(raised.value)


def test_overwritten_bytes_in_the_middle_end_in_a_sentence_or_in_all_frames(tmp_path):
    """A decoder may conceal a damaged frame; it must not lose one silently."""
    path = write_video(tmp_path / "a.mp4", map(moving_frame, range(30)), fps=10)
    data = bytearray(path.read_bytes())
    for begin in np.linspace(0.3, 0.9, 7):
        broken = data.copy()
        at = int(begin * len(data))
        broken[at:at + 200] = bytes(200)
        path.write_bytes(broken)
        try: assert len(list(read_video(path))) == 30
        except KiloError as error: assert "a.mp4" in str(error)


def test_a_file_that_names_other_files_is_not_followed(tmp_path):
    write_video(tmp_path / "secret.mp4", [moving_frame(0)], fps=1)
    for name, text in (("list.mp4", "#EXTM3U\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
                       ("concat.mp4", "ffconcat version 1.0\nfile secret.mp4\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(KiloError, match="cannot be read as a video"): video_info(tmp_path / name)
    for name in ("http://127.0.0.1:9/a.mp4", "concat:secret.mp4|secret.mp4"):
        with pytest.raises(KiloError, match="There is no video"): video_info(name)


def test_a_picture_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", [moving_frame(0)], fps=1)
    monkeypatch.setattr(video, "MAX_SIDE", 80)
    with pytest.raises(KiloError, match="96 x 64"): next(read_video(path))
    with pytest.raises(KiloError, match="resize"): write_video(tmp_path / "b.mp4", [moving_frame(0)], fps=1)


def test_frames_are_taken_one_at_a_time(tmp_path):
    """A writer that collected its frames would hold all of them when the last one is asked for."""
    given, alive = [], []

    def frames():
        for k in range(40):
            frame = moving_frame(k)
            given.append(weakref.ref(frame))
            yield frame
            del frame
            alive.append(sum(reference() is not None for reference in given))

    path = write_video(tmp_path / "a.mp4", frames(), fps=10)
    assert len(alive) == 40 and max(alive) <= 2
    assert len(list(itertools.islice(read_video(path), 3))) == 3, "a reader may stop early"


def test_a_failing_source_leaves_the_old_video_and_no_part(tmp_path):
    path = write_video(tmp_path / "a.mp4", [moving_frame(0)], fps=1)
    before = path.read_bytes()

    def failing():
        yield moving_frame(1)
        raise RuntimeError("the renderer failed")

    with pytest.raises(RuntimeError, match="renderer"): write_video(path, failing(), fps=1)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_a_rotation_in_the_file_makes_the_frames_upright(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.set_display_rotation(-90)
        frame = av.VideoFrame.from_ndarray((moving_frame(0) * 255).astype(np.uint8), format="rgb24")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    stored, upright = (next(read_video(path, upright=turn)).rgb for turn in (False, True))
    info = video_info(path)
    assert info.rotation_deg in (90, 270) and (info.width, info.height) == (64, 96)
    assert np.array_equal(np.rot90(stored, info.rotation_deg // 90), upright)


def test_tensors_bytes_and_greys_give_the_same_video(tmp_path):
    grey = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    bytes_ = (grey * 255).round().astype(np.uint8)
    given = (grey, torch.from_numpy(grey).float(), bytes_, np.repeat(bytes_[..., None], 3, -1))
    files = {write_video(tmp_path / f"{k}.mp4", [frame], 1).read_bytes() for k, frame in enumerate(given)}
    assert len(files) == 1


def test_the_same_frames_give_the_same_bytes_in_another_process(tmp_path):
    write_video(tmp_path / "here.mp4", map(moving_frame, range(20)), fps=10)
    code = ("import sys; sys.path.insert(0, 'tests'); from test_video import *; "
            "write_video(sys.argv[1], map(moving_frame, range(20)), fps=10)")
    root = str(video.Path(__file__).resolve().parent.parent)
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.mp4")], check=True, cwd=root)
    assert (tmp_path / "here.mp4").read_bytes() == (tmp_path / "there.mp4").read_bytes()


def test_the_pixels_are_yuv420p_with_a_named_matrix(tmp_path):
    """Browsers play no other layout, and guess the matrix where it is not named."""
    path = write_video(tmp_path / "a.mp4", [moving_frame(0)], fps=1)
    assert video_info(path).pixel_format == "yuv420p" and video_info(path).codec == "h264"
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (int(context.colorspace), int(context.color_range)) == (1, 1), "BT.709, limited range"


def test_a_row_of_pictures_has_one_height_and_even_sides():
    row = pictures_in_row({"a": moving_frame(0), "b": moving_frame(0, 33, 21), "c": np.zeros((64, 41))})
    assert row.shape[0] == 64 + 22 and row.shape[1] % 2 == 0
    with pytest.raises(KiloError, match="no pictures"): pictures_in_row({})


def test_a_real_recording_is_read_at_its_end():
    path = real_data("mouse_dannce_cylinder_5cam") / "videos" / "CameraE_31500.mp4"
    info = video_info(path)
    assert (info.width, info.height, info.frames) == (1328, 1048, 2758) and info.fps == pytest.approx(120)
    frame = next(read_video(path, 2757))
    assert frame.time_s == pytest.approx(2757 / 120) and frame.rgb.std() > 10
    assert video_sheet(path, 2, 2, 120).shape[1] == 240
