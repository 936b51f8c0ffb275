"""The optimisers' steps in a few lines of numpy each."""

import functools

import numpy as np

from fmeta import optim

RATE = 0.1
SHAPE = (3, 4)
KERNEL = np.random.default_rng(0).normal(size=SHAPE)
# Of several sizes, so that clips and bounds are met from both sides.
SLOPES = [
  np.random.default_rng(1 + t).normal(size=SHAPE) * (0.3 + 0.4 * t)
  for t in range(7)
]


def _averages(b):
  """The bias-corrected running mean of what it is sent."""
  mean, t, x = 0.0, 0, 0.0
  while True:
    x = yield mean / (1 - b**t) if t else 0.0
    mean, t = b * mean + (1 - b) * x, t + 1


def _average(b):
  mean = _averages(b)
  next(mean)
  return mean.send


def _nesterov(p, grads):
  v = 0.0
  for g in grads:
    v = 0.9 * v + g
    p = p - RATE * (g + 0.9 * v)
  return p


def _adamw(p, grads):
  first, second = _average(0.9), _average(0.999)
  for g in grads:
    step = first(g) / (np.sqrt(second(g**2) + 1e-3) + 1e-8)
    p = p - RATE * (step + 0.2 * p)
  return p


def _nadam(p, grads):
  m, second = 0.0, _average(0.999)
  for t, g in enumerate(grads, 1):
    m = 0.9 * m + 0.1 * g
    ahead = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
    p = p - RATE * ahead / (np.sqrt(second(g**2)) + 1e-8)
  return p


def _radam(p, grads):
  first, second, longest = _average(0.9), _average(0.999), 2 / 0.001 - 1
  for t, g in enumerate(grads, 1):
    m, v = first(g), second(g**2)
    length = longest - 2 * t * 0.999**t / (1 - 0.999**t)
    if length >= 5:
      r = (length - 4) * (length - 2) * longest
      r /= (longest - 4) * (longest - 2) * length
      m = np.sqrt(r) * m / (np.sqrt(v) + 1e-8)
    p = p - RATE * m
  return p


def _adabelief(p, grads):
  m, s = 0.0, 0.0
  for t, g in enumerate(grads, 1):
    m = 0.9 * m + 0.1 * g
    s = 0.999 * s + 0.001 * (g - m) ** 2 + 1e-16
    p = p - RATE * m / (1 - 0.9**t) / (np.sqrt(s / (1 - 0.999**t)) + 1e-16)
  return p


def _yogi(p, grads):
  m = v = 1e-6
  for t, g in enumerate(grads, 1):
    m = 0.9 * m + 0.1 * g
    v = v - 0.001 * np.sign(v - g**2) * g**2
    p = p - RATE * m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-3)
  return p


def _adagrad(p, grads):
  s = 0.1
  for g in grads:
    s = s + g**2
    p = p - RATE * g / np.sqrt(s + 1e-7)
  return p


def _rmsprop(p, grads):
  v, u = 0.0, 0.0
  for g in grads:
    v = 0.9 * v + 0.1 * g**2
    u = 0.5 * u + g / np.sqrt(v + 1e-8)
    p = p - RATE * u
  return p


def _adafactor(p, grads):
  rows = columns = 0.0
  for t, g in enumerate(grads, 1):
    b = 1 - t**-0.8
    rows = b * rows + (1 - b) * (g**2).mean(1)
    columns = b * columns + (1 - b) * (g**2).mean(0)
    u = g / np.sqrt(np.outer(rows, columns) / rows.mean())
    u = u / max(1, np.sqrt((u**2).mean()))
    p = p - RATE * max(1e-3, np.sqrt((p**2).mean())) * u
  return p


def _adan(p, grads):
  first, change, second = _average(0.98), _average(0.92), _average(0.99)
  before = grads[0]
  for g in grads:
    d, before = g - before, g
    u = first(g) + 0.08 * change(d)
    u = u / (np.sqrt(second((g + 0.08 * d) ** 2) + 1e-8) + 1e-8)
    p = p - RATE * u
  return p


def _lion(p, grads):
  m = 0.0
  for g in grads:
    p = p - RATE * (np.sign(0.9 * m + 0.1 * g) + 0.2 * p)
    m = 0.99 * m + 0.01 * g
  return p


def _novograd(p, grads):
  v, u = (grads[0] ** 2).sum(), 0.0
  for t, g in enumerate(grads):
    v = 0.98 * v + 0.02 * (g**2).sum() if t else v
    u = 0.95 * u + g / (np.sqrt(v) + 1e-8)
    p = p - RATE * u
  return p


def _lamb(p, grads):
  first, second = _average(0.9), _average(0.999)
  for g in grads:
    r = first(g) / (np.sqrt(second(g**2)) + 1e-6) + 0.01 * p
    p = p - RATE * np.linalg.norm(p) / np.linalg.norm(r) * r
  return p


def _lars(p, grads):
  v = 0.0
  for t, g in enumerate(grads):
    r = g + 0.2 * p
    rate = RATE / (1 + t)
    v = 0.9 * v + rate * 1e-3 * np.linalg.norm(p) / np.linalg.norm(r) * r
    p = p - v
  return p


def _muon(p, grads):
  m = 0.0
  for t, g in enumerate(grads, 1):
    m = 0.95 * m + 0.05 * g
    x = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
      a = x @ x.T
      x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    p = p - RATE * 0.2 * np.sqrt(max(SHAPE)) * x
  return p


def _dog(p, grads):
  start, far, total = p, 1e-6 * (1 + np.linalg.norm(p)), 0.0
  for g in grads:
    far = max(far, np.linalg.norm(p - start))
    total = total + (g**2).sum()
    p = p - far / np.sqrt(total + 1e-8) * g
  return p


def _schedule_free(p, grads):
  x = z = y = p
  for t, g in enumerate(grads, 1):
    z = z - RATE * g
    x = (1 - 1 / t) * x + z / t
    y = 0.1 * z + 0.9 * x
  return y


def _prodigy(p, grads):
  start, m, v, s, top, d, b3 = p, 0.0, 0.0, 0.0, 0.0, 1e-6, 0.999**0.5
  for t, g in enumerate(grads, 1):
    rate = d * np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    top = b3 * top + d / 1e-6 * rate * (g * (start - p)).sum()
    m = 0.9 * m + 0.1 * d * g
    v = 0.999 * v + 0.001 * (d * g) ** 2
    s = b3 * s + rate * d * g / 1e-6
    d = max(d, top / np.abs(s).sum())
    p = p - rate * m / (np.sqrt(v) + d * 1e-8)
  return p


REFERENCES = {
  'nesterov': (_nesterov, optim.nesterov),
  'adamw': (
    _adamw,
    functools.partial(
      optim.adamw, eps_root=1e-3, clip_norm=None, weight_decay=0.2
    ),
  ),
  'nadam': (_nadam, optim.nadam),
  'radam': (_radam, optim.radam),
  'adabelief': (_adabelief, optim.adabelief),
  'yogi': (_yogi, optim.yogi),
  'adagrad': (_adagrad, optim.adagrad),
  'rmsprop': (_rmsprop, functools.partial(optim.rmsprop, momentum=0.5)),
  'adafactor': (_adafactor, functools.partial(optim.adafactor, min_dim=2)),
  'adan': (_adan, optim.adan),
  'lion': (_lion, functools.partial(optim.lion, weight_decay=0.2)),
  'novograd': (_novograd, optim.novograd),
  'lamb': (_lamb, optim.lamb),
  'lars': (
    _lars,
    lambda rate: optim.lars(lambda i: rate / (1 + i), weight_decay=0.2),
  ),
  'muon': (_muon, optim.muon),
  'dog': (_dog, lambda rate: optim.dog()),
  'schedule_free': (
    _schedule_free,
    lambda rate: optim.schedule_free(optim.sgd(rate), rate),
  ),
  'prodigy': (_prodigy, lambda rate: optim.prodigy()),
}
