"""Names of what adapters add."""


def kernel_name(name: str) -> str:
  """The name of the full parameter that a trainable leaf moves."""
  head, _, last = name.rpartition('/')
  last = last.split('.')[0]
  return f'{head}/{last}' if head else last
