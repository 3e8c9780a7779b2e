"""Run records: folders keyed by the resolved configuration, with a status, and the store that reads them."""
