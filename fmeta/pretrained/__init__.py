"""Published weights under our names: safetensors only, never a pickle."""

from fmeta.pretrained.bert import load_bert, save_bert
from fmeta.pretrained.files import check_sha256, read_tensors, sha256
from fmeta.pretrained.peft import PeftConfig, load_peft, save_peft
from fmeta.pretrained.resnet import CIFAR10_SHA256, load_resnet
from fmeta.pretrained.sources import MINILM, MINILM_SHA256, find

__all__ = [
  'CIFAR10_SHA256',
  'MINILM',
  'MINILM_SHA256',
  'PeftConfig',
  'check_sha256',
  'find',
  'load_bert',
  'load_peft',
  'load_resnet',
  'read_tensors',
  'save_bert',
  'save_peft',
  'sha256',
]
