"""One evaluation as a table on the terminal and as a page with plots."""
