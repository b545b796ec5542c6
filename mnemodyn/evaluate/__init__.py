"""How good the model is: reconstruction of hidden entries, and targets predicted from scans."""
