"""Keys of the attachments that loading puts on a MODEL; clones by other nodes keep them."""

SOURCE = "svdquant.source"  # the name of the file that the user selected
CARD = "svdquant.card"  # the file's card.of_source
