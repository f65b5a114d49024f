"""Judges of identity: real weights on real photographs, and each judge's arithmetic against an independent one."""

import importlib.util
import sys
import types

import face_files
import numpy as np
import pytest
import tiny_iresnet
import tiny_onnx
import torch
from PIL import Image
from safetensors.torch import save_file

from hgdpo_core.config import JudgeConfig
from hgdpo_core.errors import ConfigError, ModelError
from hgdpo_core.scorers.identity import embed_concept, find_judge, load_judge
from hgdpo_core.scorers.identity.alignment import TEMPLATE, align_face, crop_box, fit_similarity
from hgdpo_core.scorers.identity.detector import Face, FaceDetector, suppress_overlaps
from hgdpo_core.scorers.identity.inception_resnet import InceptionResnet
from hgdpo_core.scorers.identity.judges import ArcFace, Cut, SFace, VggFace
from hgdpo_core.scorers.identity.sessions import first_operations, open_session, require_onnxruntime

OBAMA = ("obama", "obama2", "obama3", "obama_partial_face", "obama_partial_face2")


@pytest.fixture(scope="module")
def weights():
    pytest.importorskip("onnxruntime", reason="install the extra: pip install 'hgdpo[faces]'")
    return face_files.face_weights()


@pytest.fixture(scope="module")
def detector(weights):
    return FaceDetector(weights / "face_detection_yunet_2023mar.onnx")


@pytest.fixture(scope="module")
def photos():
    return {name: Image.open(path).convert("RGB") for name, path in face_files.photographs().items()}


@pytest.fixture(scope="module")
def sface(weights):
    return load_judge(JudgeConfig(name="sface", source=str(weights)), weights / "face_detection_yunet_2023mar.onnx")


# -- real weights, real photographs


def test_one_person_is_closer_than_two(sface, photos):
    cuts = {name: sface.cut(image) for name, image in photos.items()}
    assert {name: cut.faces for name, cut in cuts.items()} == dict.fromkeys(photos, 1) | {"chelsea": 0}
    assert cuts["chelsea"] == Cut(None, 0)
    names = [name for name in photos if name != "chelsea"]
    vectors = sface.embed([cuts[name].face for name in names])
    assert vectors.shape == (7, 128) and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    close = dict(zip(names, vectors @ vectors.T, strict=True))
    same = [close[a][names.index(b)] for a in OBAMA for b in OBAMA if a < b]
    different = [close[a][names.index(b)] for a in names for b in names if a < b and not {a, b} <= {*OBAMA}]
    assert len(same) == 10 and len(different) == 11
    assert min(same) > 0.6 and max(different) < 0.3  # the recogniser's own limit is 0.363
    alone = sface.embed([cuts["biden"].face])
    assert np.abs(alone[0] - vectors[names.index("biden")]).max() < 1e-5


def test_dlib_agrees(photos, sface):
    dlib, folder = _dlib()
    find = dlib.get_frontal_face_detector()
    shape = dlib.shape_predictor(str(folder["shape_predictor_68_face_landmarks.dat"]))
    network = dlib.face_recognition_model_v1(str(folder["dlib_face_recognition_resnet_model_v1.dat"]))
    vectors = {}
    for name in ("biden", "obama", "obama2", "astronaut"):
        pixels = np.asarray(photos[name])
        box = max(find(pixels, 0), key=lambda found: found.area())
        ours = sface.detector.find(photos[name])[0]
        centre = np.array([ours.box[0] + ours.box[2] / 2, ours.box[1] + ours.box[3] / 2])
        assert box.left() < centre[0] < box.right() and box.top() < centre[1] < box.bottom()
        vectors[name] = np.array(network.compute_face_descriptor(pixels, shape(pixels, box)))
    apart = {pair: np.linalg.norm(vectors[pair[0]] - vectors[pair[1]]) for pair in (
        ("obama", "obama2"), ("obama", "biden"), ("obama2", "biden"), ("astronaut", "biden"), ("astronaut", "obama"))}
    assert apart["obama", "obama2"] < 0.6 and min(value for pair, value in apart.items() if pair[1] != "obama2") > 0.6


def _dlib():
    try:
        import dlib
    except ImportError:
        found = face_files.fetch("dlib-bin", ("_dlib_pybind11.cpython-311-x86_64-linux-gnu.so",))
        library = next(iter(found.values()), None)
        if library is None:
            pytest.skip("dlib-bin has no wheel for this Python and machine")
        spec = importlib.util.spec_from_file_location("_dlib_pybind11", library)
        dlib = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(dlib)
    return dlib, face_files.fetch("face_recognition_models==0.3.0", (".dat",), source=True)


def test_two_faces_a_turned_one_and_a_tiny_one(detector, photos):
    biden, obama = (photos[name].resize((300, round(300 * photos[name].height / photos[name].width)))
                    for name in ("biden", "obama"))
    both = Image.new("RGB", (700, 700), "grey")
    both.paste(biden, (0, 0))
    both.paste(obama.resize((200, round(200 * obama.height / obama.width))), (400, 0))
    faces = detector.find(both)
    assert len(faces) == 2 and faces[0].area > faces[1].area and faces[0].box[0] < 300 < faces[1].box[0]
    assert len(detector.find(obama.rotate(45, expand=True))) == 1
    assert detector.find(obama.rotate(90, expand=True)) == []
    scene = Image.new("RGB", (640, 640), "grey")
    scene.paste(obama.resize((64, 80)), (200, 200))  # its face is 17 pixels wide
    assert len(detector.find(scene)) == 1
    scene.paste("grey", (200, 200, 264, 280))
    scene.paste(obama.resize((32, 40)), (200, 200))
    assert detector.find(scene) == []


def test_points_and_boxes_are_in_pixels_of_the_image(detector, photos):
    (small,), (large,) = (detector.find(photos["astronaut"].resize((side, side))) for side in (512, 1024))
    assert np.abs(np.array(large.box) / 2 - small.box).max() < 3
    assert np.abs(large.points / 2 - small.points).max() < 3
    left, top, width, height = small.box
    inside = small.points - (left, top)
    assert (inside > 0).all() and (inside < (width, height)).all()
    assert small.points[0, 0] < small.points[1, 0] and small.points[3, 1] > small.points[0, 1]


def test_a_concept_is_the_mean_of_its_images(sface, photos):
    one, other = (sface.embed([sface.cut(photos[name]).face])[0] for name in ("obama", "obama3"))
    both = embed_concept(sface, [photos["obama"], photos["obama3"]], "him")
    mean = (one + other) / np.linalg.norm(one + other)
    assert np.abs(both - mean).max() < 1e-6
    with pytest.raises(ModelError, match="judge sface finds no face in 1 of 2 images of the concept cat"):
        embed_concept(sface, [photos["obama"], photos["chelsea"]], "cat")


# -- arithmetic


def test_alignment_moves_the_points_onto_the_template():
    turn = np.array([(0.8, -0.6), (0.6, 0.8)]) * 2.5
    points = (TEMPLATE - 50) @ turn.T + (200, 150)
    matrix = fit_similarity(points, TEMPLATE)
    assert np.allclose(points @ matrix[:, :2].T + matrix[:, 2], TEMPLATE)
    assert np.isclose(np.linalg.det(matrix[:, :2]), 1 / 2.5**2)
    mirrored = fit_similarity(TEMPLATE * (-1, 1), TEMPLATE)
    assert np.linalg.det(mirrored[:, :2]) > 0  # a mirrored face is not reflected back
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (256, 1, 3)))
    shifted = align_face(ramp, TEMPLATE + (40, 30))
    assert (shifted[:, :, 0] == np.arange(40, 152)).all()  # whole pixels keep their values


def test_overlaps_are_suppressed_by_score():
    boxes = np.array([(0, 0, 10, 10), (1, 1, 10, 10), (20, 20, 5, 5), (0, 0, 10, 4)], dtype=float)
    assert suppress_overlaps(boxes, np.array([0.7, 0.9, 0.8, 0.65])) == [1, 2, 3]


class _OneFace:
    """A detector that finds one face, upright and exactly on the template, twice as large."""

    def find(self, image):
        return [Face((10.0, 20.0, 90.0, 120.0), TEMPLATE * 2, 0.9)]


@pytest.fixture
def picture():
    """Neither symmetric nor of equal channels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (240, 230, 3), dtype=np.uint8))


@pytest.mark.parametrize(("kind", "scales", "batch"), [(ArcFace, False, "N"), (ArcFace, True, 1), (SFace, True, 1)])
def test_onnx_judges_prepare_pixels_as_their_graph_expects(kind, scales, batch, picture, tmp_path):
    pytest.importorskip("onnxruntime")
    weight = tiny_onnx.save_recogniser(tmp_path / "net.onnx", scales=scales, batch=batch)
    judge = kind(tmp_path / "net.onnx", _OneFace())
    face = judge.cut(picture).face
    scaled = (face.astype(np.float64) - 127.5) / 127.5
    expected = scaled.transpose(2, 0, 1).reshape(1, -1) @ weight.astype(np.float64)
    expected /= np.linalg.norm(expected)
    assert np.abs(judge.embed([face, face]) - expected).max() < 1e-4
    assert np.abs(judge.embed([face[:, :, ::-1]]) - expected).max() > 0.01  # BGR is another image
    assert np.abs(judge.embed([face[:, ::-1]]) - expected).max() > 0.01
    half = np.asarray(picture).astype(float)[1::2, 1::2][:112, :112]  # twice the template: pixel 2i + 0.5
    assert np.abs(face.astype(float)[5:-5, 5:-5].mean() - half[5:-5, 5:-5].mean()) < 3


def test_first_operations_of_a_graph(tmp_path):
    tiny_onnx.save_recogniser(tmp_path / "net.onnx", scales=True)
    assert first_operations((tmp_path / "net.onnx").read_bytes(), 3) == ["Sub", "Mul", "Flatten"]
    assert first_operations(b"no protobuf at all", 2) == [] and first_operations(b"", 2) == []


@pytest.mark.parametrize("width", [8, pytest.param(64, marks=pytest.mark.slow)])  # 64 is w600k_r50's own
@pytest.mark.parametrize("scales", [False, True])
def test_arcface_is_the_independent_network(width, scales, picture, tmp_path):
    pytest.importorskip("onnxruntime")
    weights = tiny_iresnet.Weights(width)
    tiny_iresnet.save_onnx(weights, tmp_path / "w600k_r50.onnx", scales=scales)
    judge = load_judge(JudgeConfig(name="arcface", source=str(tmp_path)), _detector_file(tmp_path))
    judge.detector = _OneFace()
    face = judge.cut(picture).face

    def expected(pixels):
        prepared = (torch.from_numpy(pixels.astype(np.float32)) - 127.5) / 127.5
        vector = tiny_iresnet.embed(weights, prepared.permute(2, 0, 1)[None])[0].numpy()
        return vector / np.linalg.norm(vector)

    both = judge.embed([face, face[:, ::-1]])
    assert both.shape == (2, 512) and np.abs(both - [expected(face), expected(face[:, ::-1])]).max() < 1e-5
    apart = np.abs(both[0] - both[1]).max()
    swapped = judge.embed([face[:, :, ::-1]])[0]  # BGR is another image
    assert min(apart, np.abs(swapped - expected(face)).max()) > 1e-3
    assert np.abs(swapped - expected(face[:, :, ::-1])).max() < 1e-5


def _detector_file(folder):
    """A graph that opens as a detector; `_OneFace` takes its place."""
    return tiny_onnx.save_graph(folder / "detector.onnx", [tiny_onnx.node("Flatten", ["data"], "fc1", axis=1)], {},
                                (1, 3, 640, 640), 3 * 640 * 640)


def random_facenet(seed=0):
    torch.manual_seed(seed)
    network = InceptionResnet()
    for weight in network.parameters():
        if weight.ndim > 1:
            torch.nn.init.kaiming_normal_(weight)  # else hardly anything of an image arrives at the end
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network.eval()


def test_facenet_is_the_independent_one(picture, tmp_path):
    module = face_files.fetch("facenet-pytorch==2.5.3", ("models/inception_resnet_v1.py", "inception_resnet_v1.py"))
    reference = _load_reference(module["inception_resnet_v1.py"])
    state = random_facenet().state_dict()
    reference.load_state_dict(state)
    judge = _vggface(tmp_path, {**state, "logits.weight": torch.zeros(3, 512), "logits.bias": torch.zeros(3)})
    face = judge.cut(picture).face
    box = picture.crop((10, 20, 100, 140)).resize((160, 160), Image.Resampling.BILINEAR)
    assert (face == np.asarray(box)).all()
    with torch.no_grad():
        pixels = (torch.from_numpy(face).float() - 127.5) / 128
        expected = reference(pixels.permute(2, 0, 1)[None]).numpy()
    assert np.abs(judge.embed([face, face]) - expected).max() < 1e-5
    assert np.abs(judge.embed([face[:, :, ::-1]]) - expected).max() > 1e-3


def _load_reference(path):
    """The package's network file alone: what it downloads by is left out."""
    parent = types.ModuleType("facenet_reference")
    parent.__path__ = []
    for name in ("utils", "utils.download"):
        sys.modules[f"facenet_reference.{name}"] = types.ModuleType(name)
    sys.modules["facenet_reference"] = parent
    sys.modules["facenet_reference.utils.download"].download_url_to_file = None
    spec = importlib.util.spec_from_file_location("facenet_reference.network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.InceptionResnetV1(pretrained=None).eval()


def _vggface(folder, state):
    path = folder / "vggface.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return VggFace(path, _OneFace())


def test_facenet_refuses_other_weights(tmp_path):
    state = random_facenet().state_dict()
    del state["block8.conv2d.bias"]
    with pytest.raises(ModelError, match="lacks Inception-ResNet-v1's block8.conv2d.bias"):
        _vggface(tmp_path, state)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        _vggface(tmp_path, random_facenet().state_dict() | {"last_bn.bias": torch.full((512,), float("nan"))})


def test_a_box_is_cut_at_the_edge(picture):
    assert crop_box(picture, (-20.0, -5.0, 60.0, 50.0), 16).shape == (16, 16, 3)
    assert crop_box(picture, (300.0, 10.0, 5.0, 5.0), 16).shape == (16, 16, 3)


# -- what is refused


def test_missing_pieces_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "face_detection_yunet_2023mar.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="ArcFace has no weights that we may fetch: get w600k_r50.onnx"):
        find_judge(JudgeConfig(name="arcface"), tmp_path)
    with pytest.raises(ModelError, match="holds no face_recognition_sface_2021dec.onnx"):
        find_judge(JudgeConfig(name="sface", source=str(tmp_path)), tmp_path)
    with pytest.raises(ValueError, match="there is no such judge of identity; there are sface, arcface, vggface"):
        JudgeConfig(name="other")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="which is not installed: pip install 'hgdpo.faces.'"):
        require_onnxruntime()


def test_broken_networks_are_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="does not load as an ONNX network") as error:
        open_session(tmp_path / "broken.onnx")
    assert "\n" not in str(error.value)
    tiny_onnx.save_graph(tmp_path / "other.onnx", [tiny_onnx.node("Flatten", ["data"], "fc1", axis=1)], {},
                         ("N", 3, 8, 8), 192)
    with pytest.raises(ModelError, match=r"reads \['N', 3, 8, 8\], expected \[., 3, 112, 112\]: .* weights of arcface"):
        ArcFace(tmp_path / "other.onnx", _OneFace())
