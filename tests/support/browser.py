"""Pages in a real browser."""


def opened(browser, page, **settings):
    """Open a page and wait until it is drawn; returns it with what its console complained of."""
    view = browser.new_page(**settings)
    view.set_default_timeout(120_000)  # a busy machine takes longer than playwright waits
    complaints = []
    view.on("console", lambda told: complaints.append(told.text) if told.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.goto(page.as_uri())
    view.wait_for_selector("#trade-plot .main-svg")
    return view, complaints
