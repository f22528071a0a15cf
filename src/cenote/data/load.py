def load_data(spec, *, validation_fraction=0.1, seed=0, **kw):
    assert spec == "digits"
    from cenote.data.digits import load_digits
    return load_digits(validation_fraction, seed)
