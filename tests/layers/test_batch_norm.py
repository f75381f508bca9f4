"""Normalization layers against torch and the formulas."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from detlib.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm, get_norm
from detlib.layers.batch_norm import LayerNorm


def make_frozen(num_features=5):
    generator = torch.Generator().manual_seed(0)
    norm = FrozenBatchNorm2d(num_features, eps=1e-3)
    for name in ("weight", "bias", "running_mean"):
        getattr(norm, name).copy_(torch.randn(num_features, generator=generator))
    norm.running_var.copy_(torch.rand(num_features, generator=generator) + 0.1)
    return norm


class TestFrozenBatchNorm:
    @pytest.mark.parametrize("needs_grad", [False, True])
    def test_forward_matches_the_formula(self, needs_grad):
        norm = make_frozen()
        x = torch.randn(2, 5, 4, 3, requires_grad=needs_grad)
        y = norm(x)
        for c in range(5):
            expected = (x[:, c] - norm.running_mean[c]) / (norm.running_var[c] + 1e-3) ** 0.5
            torch.testing.assert_close(y[:, c], expected * norm.weight[c] + norm.bias[c])
        if needs_grad:
            y.sum().backward()
            scale = norm.weight / (norm.running_var + 1e-3).sqrt()
            torch.testing.assert_close(x.grad, scale[None, :, None, None].expand_as(x))

    def test_gradcheck_and_gradgradcheck(self):
        norm = make_frozen().double()
        x = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(norm, x) and torch.autograd.gradgradcheck(norm, x)

    def test_backward_does_not_keep_the_input(self):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = make_frozen()(torch.randn(2, 5, 4, 3, requires_grad=True))
        assert y.requires_grad and kept == [(5,), (5,)]

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_output_keeps_the_memory_format(self, memory_format):
        x = torch.randn(2, 5, 4, 3).contiguous(memory_format=memory_format).requires_grad_()
        y = make_frozen()(x)
        y.backward(torch.ones_like(y))
        assert y.stride() == x.grad.stride() == x.stride()

    def test_new_norm_is_the_identity_without_parameters(self):
        norm = FrozenBatchNorm2d(3)
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(norm(x), x)
        assert list(norm.parameters()) == []
        assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
        assert "num_features=3" in repr(norm)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_output_keeps_half_precision(self, dtype):
        x = torch.randn(2, 5, 4, 3).to(dtype)
        for needs_grad in (False, True):
            y = make_frozen()(x.clone().requires_grad_(needs_grad))
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), make_frozen()(x.float()), rtol=0.02, atol=0.05)

    def test_loads_version_1_files_without_running_statistics(self):
        norm = make_frozen()
        norm.load_state_dict({"weight": torch.full((5,), 2.0), "bias": torch.full((5,), 3.0)})
        assert norm.weight.tolist() == [2] * 5 and norm.running_mean.tolist() == [0] * 5
        assert norm.running_var.tolist() == [1] * 5
        # A file of the current version must be complete.
        state = norm.state_dict()
        del state["running_var"]
        with pytest.raises(RuntimeError, match="running_var"):
            norm.load_state_dict(state)

    def test_converts_from_and_to_batch_norm(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.Sequential(nn.SyncBatchNorm(4))
        )
        for norm in (model[1], model[2][0]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
        x = torch.randn(2, 3, 6, 6)
        expected = copy.deepcopy(model).eval()(x)
        model[1].num_batches_tracked += 7
        names = set(model.state_dict())

        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(model)
        assert (
            frozen is model and type(model[1]) is FrozenBatchNorm2d and type(model[2][0]) is FrozenBatchNorm2d
        )
        assert model[1].eps == 1e-3 and set(model.state_dict()) == names
        assert model[1].num_batches_tracked == 7
        # Files from before the conversion and files without the counter both load.
        model.load_state_dict({n: x for n, x in model.state_dict().items() if "num_batches" not in n})
        torch.testing.assert_close(model.train()(x), expected)

        FrozenBatchNorm2d.convert_frozenbatchnorm2d_to_batchnorm2d(model)
        assert type(model[1]) is nn.BatchNorm2d and model[1].weight.requires_grad
        assert model[1].num_batches_tracked == 7
        torch.testing.assert_close(model.eval()(x), expected)

    def test_converts_a_bare_norm_and_a_norm_without_affine(self):
        norm = nn.BatchNorm2d(3, affine=False)
        norm.running_mean.fill_(2.0)
        frozen = FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
        assert type(frozen) is FrozenBatchNorm2d and frozen.weight.tolist() == [1, 1, 1]
        assert frozen.running_mean.tolist() == [2, 2, 2]


def test_layer_norm_normalizes_over_channels():
    norm = LayerNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)
    expected = F.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    torch.testing.assert_close(norm(x), expected)


class TestGetNorm:
    @pytest.mark.parametrize(
        "name, kind",
        [
            ("BN", nn.BatchNorm2d),
            ("SyncBN", nn.SyncBatchNorm),
            ("nnSyncBN", nn.SyncBatchNorm),
            ("naiveSyncBN", NaiveSyncBatchNorm),
            ("naiveSyncBN_N", NaiveSyncBatchNorm),
            ("FrozenBN", FrozenBatchNorm2d),
            ("GN", nn.GroupNorm),
            ("LN", LayerNorm),
        ],
    )
    def test_config_name_builds_the_layer(self, name, kind):
        norm = get_norm(name, 64)
        assert type(norm) is kind
        assert norm(torch.randn(2, 64, 3, 3)).shape == (2, 64, 3, 3)
        if name == "GN":
            assert norm.num_groups == 32

    def test_accepts_none_and_callables(self):
        assert get_norm("", 8) is None and get_norm(None, 8) is None
        assert get_norm(lambda channels: nn.GroupNorm(4, channels), 8).num_groups == 4

    def test_unknown_name_lists_legal_names(self):
        with pytest.raises(
            ValueError, match=r"Unknown norm 'FrozenBn'\. Legal: BN, .*Did you mean 'FrozenBN'"
        ):
            get_norm("FrozenBn", 8)


def test_cycle_batch_norm_list_uses_one_norm_per_level():
    norms = CycleBatchNormList(2, num_features=3)
    norms.weight.data.fill_(2.0)
    norms.bias.data.fill_(1.0)
    first, second = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5) * 3 + 7
    for x in (first, second, first):
        torch.testing.assert_close(norms(x), F.batch_norm(x, None, None, training=True) * 2 + 1)
    assert norms[1].running_mean.min() > 0.4 and norms[0].num_batches_tracked == 2
    assert {"weight", "bias"} == {name for name, _ in norms.named_parameters()}
    assert norms.extra_repr() == "affine=True"
    plain = CycleBatchNormList(2, num_features=3, affine=False)
    assert list(plain.parameters()) == [] and plain(first).shape == first.shape


def test_naive_sync_batch_norm_in_one_process_is_batch_norm():
    x = torch.randn(3, 4, 5, 5)
    ours, plain = NaiveSyncBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), plain(x)) and torch.equal(ours.running_var, plain.running_var)
    with pytest.raises(ValueError, match='stats_mode must be "" or "N", got \'M\''):
        NaiveSyncBatchNorm(4, stats_mode="M")


def _batches(sizes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, 4, 3, 5, generator=generator) * 2 + 1 for size in sizes]


_SYNC_CASES = [((2, 2), ""), ((3, 1), "N"), ((2, 0), "N")]


def _run_sync_norms(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save([_run_sync_norm(rank, *case) for case in _SYNC_CASES], f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def _run_sync_norm(rank, sizes, stats_mode):
    torch.manual_seed(0)
    norm = NaiveSyncBatchNorm(4, stats_mode=stats_mode)
    nn.init.normal_(norm.weight)
    x = _batches(sizes)[rank].requires_grad_()
    y = norm(x)
    (y * torch.arange(y.numel()).reshape(y.shape).cos()).sum().backward()
    return y.detach(), x.grad, norm.weight.grad, norm.running_mean, norm.running_var


@pytest.fixture(scope="module")
def sync_results(tmp_path_factory):
    """Return the results of each of two processes, by case."""
    folder = tmp_path_factory.mktemp("sync")
    mp.spawn(_run_sync_norms, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("case", range(len(_SYNC_CASES)))
def test_naive_sync_batch_norm_over_two_processes_matches_one_process(case, sync_results):
    sizes, _ = _SYNC_CASES[case]
    outputs = [results[case] for results in sync_results]

    # One process with all images must give the same result.
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    x = torch.cat(_batches(sizes)).requires_grad_()
    y = norm(x)
    parts = [torch.arange(part.numel()).reshape(part.shape).cos() for part in y.split(sizes)]
    (y * torch.cat(parts)).sum().backward()
    torch.testing.assert_close(torch.cat([o[0] for o in outputs]), y.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([o[1] for o in outputs]), x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum(o[2] for o in outputs), norm.weight.grad, rtol=1e-4, atol=1e-3)
    mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), unbiased=False)
    for output in outputs:
        torch.testing.assert_close(output[3], 0.1 * mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output[4], 0.9 + 0.1 * var, rtol=1e-4, atol=1e-5)


def test_naive_sync_batch_norm_rejects_an_empty_batch_in_plain_mode(monkeypatch):
    monkeypatch.setattr("detlib.layers.batch_norm.comm.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="naiveSyncBN_N"):
        NaiveSyncBatchNorm(4)(torch.zeros(0, 4, 2, 2))
