"""Loss, gradient and center against the official loss, and against all pairs written out."""

import numpy as np
import pytest
import torch

from dino_sparo.training.loss import DINOLoss


def test_golden_loss_gradient_and_center(golden):
    arrays = golden("loss")
    loss_fn = DINOLoss(num_prototypes=256)
    for epoch in (0, 1, 5):  # each begins with the same center
        loss_fn.center.copy_(torch.from_numpy(arrays["center_before"]))
        student = torch.from_numpy(arrays[f"student.{epoch}"]).requires_grad_()
        teacher = torch.from_numpy(arrays[f"teacher.{epoch}"])
        loss = loss_fn(student, teacher, float(arrays[f"teacher_temp.{epoch}"]))
        loss.backward()
        loss_fn.update_center(teacher)
        # float32; logsumexp minus dot product against the official sum of 18 log-softmax terms
        np.testing.assert_allclose(loss.item(), arrays[f"loss.{epoch}"], rtol=1e-6)
        np.testing.assert_allclose(student.grad, arrays[f"student_grad.{epoch}"], atol=1e-7, rtol=1e-5)
        np.testing.assert_allclose(loss_fn.center, arrays[f"center_after.{epoch}"], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("num_crops", [2, 3, 10])
def test_equals_all_pairs_written_out(num_crops):
    batch, prototypes = 3, 7
    loss_fn = DINOLoss(prototypes, student_temp=0.2).double()
    loss_fn.center.normal_()
    student = torch.randn(num_crops * batch, prototypes, dtype=torch.float64)
    teacher = torch.randn(2 * batch, prototypes, dtype=torch.float64)
    pairs = []
    for i in range(2):
        q = ((teacher[i * batch : (i + 1) * batch].float() - loss_fn.center) / 0.05).softmax(-1)
        for j in range(num_crops):
            if i != j:
                log_p = (student[j * batch : (j + 1) * batch] / 0.2).log_softmax(-1)
                pairs.append(-(q * log_p).sum(-1).mean())
    expected = torch.stack(pairs).mean()
    torch.testing.assert_close(loss_fn(student, teacher, 0.05).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_autograds_to_the_bit():
    student, teacher = torch.randn(10 * 3, 7).requires_grad_(), torch.randn(2, 3, 7)
    DINOLoss(7)(student, teacher.flatten(0, 1), 0.04).backward()
    answers = (teacher / 0.04).softmax(-1)
    plain = student.detach().requires_grad_()
    scaled = (plain / 0.1).unflatten(0, (10, 3))
    normalizers = scaled.logsumexp(-1)
    globals_ = normalizers[:2].sum() - (answers.flip(0) * scaled[:2]).sum()
    locals_ = 2 * normalizers[2:].sum() - (answers.sum(0) * scaled[2:]).sum()
    ((globals_ + locals_) / (2 * 9 * 3)).backward()
    assert torch.equal(student.grad, plain.grad)


def test_the_gradient_is_computed_once():
    student = torch.randn(4, 7).requires_grad_()
    loss = DINOLoss(7)(student, torch.randn(4, 7), 0.04)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
