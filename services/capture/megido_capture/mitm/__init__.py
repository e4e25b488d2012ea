"""Where mitmproxy's own layers are slow, hang, forget, or take without a bound: everything that is put into them."""
